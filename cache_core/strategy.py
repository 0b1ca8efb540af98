"""Strategy of a run (when to compute, how to fill skips, what to keep where), and the settings of a user that lead to one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .calibration.calibration import Calibration, Forecast, TriedPlan
from .calibration.use import NotCoveredError, check_covered, first_forecast, predictor_of, searched_plan, tried_plan_at
from .checks import check_count, check_number, check_one_of, check_type
from .costs import assumed_costs
from .engine.linear_sites import Factors, check_factors
from .planning.kinds import Kind
from .planning.plan import Plan
from .planning.policies import AlwaysCompute, DucaCycle, FixedInterval, FrontLoaded, Given, IccCycle, Policy, Request
from .planning.schedule import Schedule
from .predictors import AUTO, PREDICTORS, Predictor, Reuse
from .run_start import RunStart
from .store import StoreFormat

MODES = ("auto", "paper", "forecast", "off", "icc")

_FEW_STEPS = 8  # with fewer steps in a run, fewer steps without a cache looked better (docs/benchmarks.md)
_FEW_COMPUTED = 4  # the same where fewer than this many steps are full, conservative or incremental
_NOISY = (
    "this sampler adds noise between steps, and skipped steps would leave it in the picture: every step is computed in full. "
    "To skip steps, choose a sampler that adds no noise (euler, dpmpp_2m, res_multistep …)"
)
_FACTORS_ONLY = (
    "the calibration is not used: it has only low-rank factors, which are for mode icc. Run SVD Calibrator with a forecast for mode auto"
)
_OTHER_INPUT = (
    "the calibration is not used: it was made by another version of this pack, which read this model's input differently; "
    "run SVD Calibrator again"
)
_UNTRIED = (
    "it is not known whether this sampler adds noise between steps, because it could not be tried out: every step is computed in full"
)


@dataclass(frozen=True)
class Strategy:
    """Everything that a run needs to know about how to cache.

    Args:
        policy: Chooses the kind of every step.
        predictor: Fills skipped evaluations.
        token_share: Share 0..1 of the tokens that a conservative evaluation recomputes.
        seed: Seed of the random choice of these tokens.
        storage: Device and dtype in which features are kept.
        name: Name of the strategy in reports.
        factors: Low-rank factors of the linear layers. Plans with incremental evaluations need them.
        first_only: If a sampler evaluates a step several times, only the first evaluation is of the plan's kind and the others are skipped.
        corrects: Whether full evaluations correct the error of the skipped ones before them. Has an effect only on an Euler sampler; see
            `Corrector`.
        notices: Messages for the user at the start of a run.

    Raises:
        ValueError: If `token_share` lies outside 0..1.
    """

    policy: Policy = AlwaysCompute()
    predictor: Predictor = Reuse()
    token_share: float = 0.1
    seed: int = 0
    storage: StoreFormat = StoreFormat()
    name: str = "all full"
    factors: Factors | None = None
    first_only: bool = False
    corrects: bool = False
    notices: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not 0 <= self.token_share <= 1:
            raise ValueError(f"the token share must lie in 0..1, not {self.token_share}")


@dataclass(frozen=True)
class Settings:
    """What a user chooses on DuCa Cache.

    Args:
        mode: One of `MODES`.
        speedup: Number of steps divided by the cost of the plan in full evaluations, at least 1. Skipped steps cost nothing.
        cycle_length: Steps from one full evaluation to the next. 0 follows `speedup`. Mode "auto" does not use it.
        token_share: Share 0..1 of the tokens that a conservative evaluation recomputes.
        warmup: Full steps at the beginning. None takes the default of the mode. Mode "auto" does not use it.
        tail: Full steps at the end.
        skip_from, skip_to: Part 0..1 of the sampling in which evaluations may be skipped.
        predictor: A key of `PREDICTORS`, for mode "forecast".
        seed: Seed of the random choice of tokens.
        storage: Device and dtype in which features are kept.
        calibration: Calibration of the model. Mode "auto" uses its forecast, mode "icc" its factors.
        schedule: Chooses the full steps in place of `speedup`, `cycle_length`, `warmup`, `tail`, `skip_from` and `skip_to`. The mode still
            chooses how the other steps are filled. Mode "off" does not use it.

    Raises:
        ValueError: For a value that is not allowed, with a message for the user.
    """

    mode: str = "auto"
    speedup: float = 2.0
    cycle_length: int = 0
    token_share: float = 0.1
    warmup: int | None = None
    tail: int = 0
    skip_from: float = 0.0
    skip_to: float = 1.0
    predictor: str = "chebyshev"
    seed: int = 0
    storage: StoreFormat = field(default_factory=StoreFormat)
    calibration: Calibration | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        check_one_of("mode", self.mode, MODES)
        check_one_of("predictor", self.predictor, PREDICTORS)
        check_number("speedup", self.speedup, 1)
        check_number("token share", self.token_share, 0, 1)
        check_number("start", self.skip_from, 0, 1)
        check_number("end", self.skip_to, 0, 1)
        if self.skip_from > self.skip_to:
            raise ValueError(f"start ({self.skip_from:g}) must not be greater than end ({self.skip_to:g})")
        for name, steps in (("cycle length", self.cycle_length), ("warm-up", self.warmup or 0), ("tail", self.tail)):
            check_count(name, steps)
        check_count("seed", self.seed)
        check_type("calibration", self.calibration, Calibration, "SVD Calibrator or Load Calibration")
        check_type("schedule", self.schedule, Schedule, "Cache Schedule")

    @property
    def part(self) -> tuple[float, float]:
        """The part 0..1 of the sampling in which evaluations may be skipped."""
        return (self.skip_from, self.skip_to) if self.schedule is None else self.schedule.part

    def strategy(self, start: RunStart) -> Strategy:
        """Returns the strategy of a run with these settings.

        The strategy is all full, with a notice, if the sampler adds noise that forecasts would leave in the picture.

        Raises:
            ValueError: If the mode or the schedule needs a part of a calibration that is missing, or if the plan or the factors do not fit
                the run.
        """
        strategy = self._wanted(start)
        plan = strategy.policy.plan(start.timeline.steps, start.window)
        if start.adds_noise is not False and (strategy.first_only or plan.skips):
            notice = _NOISY if start.adds_noise else _UNTRIED
            return Strategy(name=f"{strategy.name}, computed in full", storage=self.storage, notices=(notice,))
        return replace(strategy, notices=(*strategy.notices, *_warnings(plan)))

    def _wanted(self, start: RunStart) -> Strategy:
        """Returns the same, without a look at the noise that the sampler adds."""
        common: dict[str, Any] = {"token_share": self.token_share, "seed": self.seed, "storage": self.storage}
        if self.mode != "off" and self.schedule is not None:
            return self._scheduled(self.schedule, start, common)
        if self.mode == "off" or (self.mode in ("auto", "forecast") and self.speedup == 1 and not self.cycle_length):
            return Strategy(**common)
        if self.mode == "auto":
            return self._auto(start, common)
        if self.mode == "icc":
            return self._icc(start, common)
        if self.mode == "paper":
            warmup = 3 if self.warmup is None else self.warmup
            cycle = DucaCycle.asked(self._request(start, warmup))
            return Strategy(cycle, Reuse(), name=f"DuCa N={cycle.cycle_length} share {self.token_share:g}", **common)
        name = f"{self.predictor} forecast {f'every {self.cycle_length}' if self.cycle_length else f'{self.speedup:g}x'}"
        return Strategy(self._forecast_policy(), PREDICTORS[self.predictor](), name=name, **common)

    def _scheduled(self, schedule: Schedule, start: RunStart, common: dict[str, Any]) -> Strategy:
        """Returns the strategy of a run with a schedule: the schedule chooses the full steps, the mode how the others are filled."""
        policy, notices = schedule.policy_for(start, assumed_costs(self.token_share), self.calibration)
        predictor: Predictor = PREDICTORS[self.predictor]() if self.mode == "forecast" else Reuse()
        common["corrects"] = self.mode == "auto"
        plan = policy.plan(start.timeline.steps, start.window)
        if self.mode == "auto":
            predictor = AUTO
            forecast = first_forecast(self.calibration, schedule.calibration)
            if forecast is not None:
                tried, refused = _tried_plan(forecast, start, plan.count(Kind.FULL))
                predictor = predictor_of(forecast.model, tried.share if tried is not None else None)
                notices += refused
        factors = None
        if plan.has(Kind.INCREMENTAL):
            held = [each.factors for each in (self.calibration, schedule.calibration) if each is not None]
            factors = next((each.tensors for each in held if each is not None), None)
            if factors is not None:
                check_factors(start.network, factors)
        return Strategy(policy, predictor, name=schedule.name, factors=factors, first_only=schedule.first_only, notices=notices, **common)

    def _auto(self, start: RunStart, common: dict[str, Any]) -> Strategy:
        """Returns the strategy of mode auto.

        With a calibration that covers the run, it is the plan and the predictor that did best when the calibration tried them out. Else it
        is the front-loaded plan with the uncalibrated predictor, which does best in general.
        """
        policy: Policy = FrontLoaded(self.speedup, tail=self.tail)
        name = f"auto {self.speedup:g}x"
        uncalibrated = Strategy(policy, AUTO, name=name, corrects=True, **common)
        if self.calibration is None:
            return uncalibrated
        forecast = self.calibration.forecast
        if forecast is None:
            return replace(uncalibrated, notices=(_FACTORS_ONLY,))
        budget = max(2, round(start.timeline.steps / self.speedup))
        tried, refused = _tried_plan(forecast, start, budget)
        if tried is None:
            return replace(uncalibrated, notices=refused)
        notices: tuple[str, ...] = ()
        if tried.searched_from and start.is_euler:
            times = start.timeline.times[:-1]
            window = range(start.window.start, min(start.window.stop, len(times) - self.tail))
            policy = Given(searched_plan(forecast, times, window, budget, tried.searched_from, is_corrected=True))
        elif tried.searched_from:  # without the corrector no such plan was tried
            notices = ("the calibration's plan is used with the samplers euler and ddim only; this run has the plan of auto",)
        predictor = predictor_of(forecast.model, tried.share)
        is_other = policy is not uncalibrated.policy or tried.share is not None
        did = "calibrated" if is_other else "calibrated: no gain at this speed"  # in the trials of the calibration
        return replace(uncalibrated, policy=policy, predictor=predictor, name=f"{name}, {did}", notices=notices)

    def _icc(self, start: RunStart, common: dict[str, Any]) -> Strategy:
        """Returns the strategy of mode icc, with the given cycle length or the shortest one whose estimated cost meets the speedup."""
        if self.calibration is None or self.calibration.factors is None:
            raise ValueError("mode icc needs low-rank factors of this model: run SVD Calibrator with an ICC method first")
        factors = self.calibration.factors.tensors
        check_factors(start.network, factors)
        cycle = IccCycle.asked(self._request(start, 1 if self.warmup is None else self.warmup, factors))
        name = f"ICC {self.calibration.about.method} rank {self.calibration.about.rank} every {cycle.interval}"
        return Strategy(cycle, Reuse(), name=name, factors=factors, **common)

    def _request(self, start: RunStart, warmup: int, factors: Factors | None = None) -> Request:
        costs = assumed_costs(self.token_share, factors)
        return Request(start.timeline.steps, self.speedup, self.cycle_length, warmup, self.tail, costs=costs)

    def _forecast_policy(self) -> Policy:
        if self.cycle_length:
            return FixedInterval(self.cycle_length, 3 if self.warmup is None else self.warmup, self.tail)
        return FrontLoaded(self.speedup, warmup=1 if self.warmup is None else self.warmup, tail=self.tail)


@dataclass(frozen=True)
class FixedSettings(Settings):
    """Uses one given strategy for every run. For experiments.

    Args:
        fixed: The strategy.
    """

    mode: str = "forecast"  # no calibration is looked for in this mode
    fixed: Strategy = Strategy()

    def strategy(self, start: RunStart) -> Strategy:
        return self.fixed


def _warnings(plan: Plan) -> tuple[str, ...]:
    """Returns a notice for a plan that leaves little to forecast from, or none."""
    full, computed = plan.count(Kind.FULL), len(plan) - plan.count(Kind.SKIPPED)
    if full == len(plan) or (len(plan) >= _FEW_STEPS and computed >= _FEW_COMPUTED):
        return ()
    return (
        f"only {full} of {len(plan)} steps are computed in full: a run with fewer steps and no cache is likely to look better; "
        "compare both",
    )


def _tried_plan(forecast: Forecast, start: RunStart, budget: int) -> tuple[TriedPlan | None, tuple[str, ...]]:
    """Returns the plan and the predictor that did best in the trials of a calibration, or None and a notice with the reason.

    Args:
        forecast: The forecast of the calibration.
        start: The run that it is wanted for.
        budget: Number of full evaluations of the run.
    """
    if forecast.model.has_no_input is bool(start.family.embed):
        return None, (_OTHER_INPUT,)
    try:
        check_covered(forecast, start.timeline.times[:-1])
    except NotCoveredError as reason:
        return None, (f"the calibration is not used: {reason}",)
    return tried_plan_at(forecast, start.timeline.steps, budget), ()

"""A complete choice: when to compute, with what to fill, how many tokens to refresh, where to keep it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

from .calibration.calibration import Calibration, Choice, Forecast
from .calibration.use import NotCoveredError, check_covered, choice_at, predictor_of, searched_plan
from .checks import check_count, check_kind, check_number, check_one_of
from .engine.linear_sites import Factors, check_factors, weight_share
from .kinds import Kind
from .opening import Opening
from .policies import AlwaysCompute, FixedInterval, FrontLoaded, Given, IccCycle, Policy
from .predictors import AUTO, PREDICTORS, Predictor, Reuse
from .schedule import Schedule, duca_cycle, shortest
from .store import StoreFormat

MODES = ("auto", "paper", "forecast", "off", "icc")

ATTENTION_COST = 0.1  # a calibrated evaluation's cost beyond its layers', for the same purpose; FLUX at 1024²: 0.15


_NOISY = (
    "this sampler adds noise at every step, which forecasts would leave in the picture: everything is computed in full; "
    "choose a sampler that adds none (euler, dpmpp_2m, res_multistep …)"
)
_UNTRIED = "what this sampler does could not be tried out beforehand: everything is computed in full"


@dataclass(frozen=True)
class Strategy:
    """policy: when. predictor: with what. token_share: recomputed by conservative evaluations, 0..1. seed: of their choice.

    storage: where features live. name: what a report calls it. factors: what plans with calibrated evaluations need.
    first_only: of several evaluations of one step, only the first is of the plan's kind; the others are aggressive.
    corrects: whether full evaluations make up for what was skipped before them, where the sampler is Euler's (see Corrector).
    notices: what the user is to be told when a run with it begins.
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
    """What a user chooses. Zero cycle_length means: follow the speedup slider. Raises ValueError for what cannot be.

    speedup: wanted number of evaluations per full one, at least 1. token_share, start, end: 0..1.
    warmup, tail: full steps at both ends; None takes the mode's own. predictor: a key of PREDICTORS, for mode "forecast".
    calibration: of the model, used by modes "auto" (its forecast) and "icc" (its factors). schedule: says when in place of speedup,
    cycle_length, warmup, tail, start and end; the mode still says with what. chosen: a strategy instead of all this.
    """

    mode: str = "auto"
    speedup: float = 2.0
    cycle_length: int = 0
    token_share: float = 0.1
    warmup: int | None = None
    tail: int = 0
    start: float = 0.0
    end: float = 1.0
    predictor: str = "chebyshev"
    seed: int = 0
    storage: StoreFormat = field(default_factory=StoreFormat)
    calibration: Calibration | None = None
    schedule: Schedule | None = None
    chosen: Strategy | None = None

    def __post_init__(self) -> None:
        check_one_of("mode", self.mode, MODES)
        check_one_of("predictor", self.predictor, PREDICTORS)
        check_number("speedup", self.speedup, 1)
        check_number("token share", self.token_share, 0, 1)
        check_number("start", self.start, 0, 1)
        check_number("end", self.end, 0, 1)
        if self.start > self.end:
            raise ValueError(f"the start of what may be skipped ({self.start:g}) lies after its end ({self.end:g})")
        for name, steps in (("cycle length", self.cycle_length), ("warm-up", self.warmup or 0), ("tail", self.tail)):
            check_count(name, steps)
        check_count("seed", self.seed)
        check_kind("calibration", self.calibration, Calibration, "SVD Calibrator or Load Calibration")
        check_kind("schedule", self.schedule, Schedule, "Cache Schedule")

    @property
    def part(self) -> tuple[float, float]:
        """The part 0..1 of the sampling in which evaluations may be skipped."""
        return (self.start, self.end) if self.schedule is None else self.schedule.part

    def strategy(self, opening: Opening) -> Strategy:
        """What the settings mean for a run. Raises ValueError where the mode needs a calibration that is not there."""
        if self.chosen is not None:
            return self.chosen
        strategy = self._wanted(opening)
        skips = strategy.first_only or strategy.policy.plan(opening.timeline.steps, opening.window).skips
        if opening.adds_noise is False or not skips:
            return strategy
        notice = _NOISY if opening.adds_noise else _UNTRIED
        return Strategy(name=f"{strategy.name}, computed in full", storage=self.storage, notices=(notice,))

    def _wanted(self, opening: Opening) -> Strategy:
        """The same, whatever the sampler does."""
        common: dict[str, Any] = {"token_share": self.token_share, "seed": self.seed, "storage": self.storage}
        if self.mode != "off" and self.schedule is not None:
            return self._scheduled(self.schedule, opening, common)
        if self.mode == "off" or (self.mode in ("auto", "forecast") and self.speedup == 1 and not self.cycle_length):
            return Strategy(**common)
        if self.mode == "auto":
            return self._auto(opening, common)
        if self.mode == "icc":
            return self._icc(opening, common)
        if self.mode == "paper":
            warmup = 3 if self.warmup is None else self.warmup
            cycle = duca_cycle(opening.timeline.steps, self.speedup, self.cycle_length, self.token_share, warmup, self.tail)
            return Strategy(cycle, Reuse(), name=f"DuCa N={cycle.cycle_length} share {self.token_share:g}", **common)
        name = f"{self.predictor} forecast {f'every {self.cycle_length}' if self.cycle_length else f'{self.speedup:g}x'}"
        return Strategy(self._forecast_policy(), PREDICTORS[self.predictor](), name=name, **common)

    def _scheduled(self, schedule: Schedule, opening: Opening, common: dict[str, Any]) -> Strategy:
        """What the mode fills with, at the schedule's times."""
        policy, notices = schedule.policy(opening, self.token_share, self.calibration)
        predictor: Predictor = PREDICTORS[self.predictor]() if self.mode == "forecast" else Reuse()
        common["corrects"] = self.mode == "auto"
        calibration = self.calibration or schedule.calibration
        if self.mode == "auto":
            plan = policy.plan(opening.timeline.steps, opening.window)
            predictor = AUTO
            if calibration is not None and calibration.forecast is not None:
                choice, refused = _tried(calibration.forecast, opening, plan.count(Kind.FULL))
                predictor = predictor_of(calibration.forecast.model, choice.share if choice is not None else None)
                notices += refused
        factors = None
        if (
            calibration is not None
            and calibration.factors is not None
            and policy.plan(opening.timeline.steps, opening.window).has(Kind.CALIBRATED)
        ):
            factors = calibration.factors.tensors
            check_factors(opening.network, factors)
        return Strategy(policy, predictor, name=schedule.name, factors=factors, first_only=schedule.first_only, notices=notices, **common)

    def _auto(self, opening: Opening, common: dict[str, Any]) -> Strategy:
        """The plan that does best in general, filled without calibration; or what did best in the calibration where it covers the run."""
        policy: Policy = FrontLoaded(self.speedup, tail=self.tail)
        name = f"auto {self.speedup:g}x"
        uncalibrated = Strategy(policy, AUTO, name=name, corrects=True, **common)
        if self.calibration is None:
            return uncalibrated
        forecast = self.calibration.forecast
        if forecast is None:
            return replace(uncalibrated, notices=("the calibration is not used: it holds no forecast, only low-rank factors for mode icc",))
        full = max(2, round(opening.timeline.steps / self.speedup))
        choice, refused = _tried(forecast, opening, full)
        if choice is None:
            return replace(uncalibrated, notices=refused)
        notices: tuple[str, ...] = ()
        if choice.searched_from and opening.is_euler:
            times = opening.timeline.times[:-1]
            window = range(opening.window.start, min(opening.window.stop, len(times) - self.tail))
            policy = Given(searched_plan(forecast, times, window, full, choice.searched_from, is_corrected=True))
        elif choice.searched_from:  # elsewhere nothing makes up for the forecasts, and no such plan was tried
            notices = ("the plan of the calibration is not used: it is for the samplers euler and ddim",)
        predictor = predictor_of(forecast.model, choice.share)
        is_other = policy is not uncalibrated.policy or choice.share is not None
        did = "calibrated" if is_other else "calibrated: does best as without"  # when it was tried out
        return replace(uncalibrated, policy=policy, predictor=predictor, name=f"{name}, {did}", notices=notices)

    def _icc(self, opening: Opening, common: dict[str, Any]) -> Strategy:
        """The given cycle length, or the shortest one whose estimated cost meets the speedup."""
        if self.calibration is None or self.calibration.factors is None:
            raise ValueError("mode icc needs low-rank factors of this model: run SVD Calibrator with an ICC method first")
        factors = self.calibration.factors.tensors
        check_factors(opening.network, factors)
        warmup, steps, length = 1 if self.warmup is None else self.warmup, opening.timeline.steps, self.cycle_length
        if not length:
            cost = weight_share(factors) + ATTENTION_COST
            costs = {Kind.FULL: 1.0, Kind.CALIBRATED: cost}
            length = shortest(lambda n: IccCycle(n, warmup, self.tail), steps, self.speedup, costs)
        name = f"ICC {self.calibration.about.method} rank {self.calibration.about.rank} every {length}"
        return Strategy(IccCycle(length, warmup, self.tail), Reuse(), name=name, factors=factors, **common)

    def _forecast_policy(self) -> Policy:
        if self.cycle_length:
            return FixedInterval(self.cycle_length, 3 if self.warmup is None else self.warmup, self.tail)
        return FrontLoaded(self.speedup, warmup=1 if self.warmup is None else self.warmup, tail=self.tail)


def _tried(forecast: Forecast, opening: Opening, full: int) -> tuple[Choice | None, tuple[str, ...]]:
    """What did best when that was tried out, or None and why."""
    if forecast.model.has_no_input is bool(opening.family.embed):
        return None, ("the calibration is not used: it was made with the model's input described otherwise; calibrate anew",)
    try:
        check_covered(forecast, opening.timeline.times[:-1])
    except NotCoveredError as reason:
        return None, (f"the calibration is not used: {reason}",)
    return choice_at(forecast, opening.timeline.steps, full), ()

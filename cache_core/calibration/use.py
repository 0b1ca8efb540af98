"""Gives the plans and predictors that a calibration recommends for a run, whose times may differ from the calibrated ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..planning.kinds import Kind
from ..planning.plan import Plan
from ..planning.policies import FrontLoaded
from ..planning.search import PlanSearch
from ..predictors import AUTO, Calibrated, Predictor
from .calibration import Calibration, Forecast, TriedPlan
from .statistics import ForecastModel

_MADE_UP = 0.5  # share of errors that counts as corrected; with it the cost correlates best with PSNR, with 0.3 and 0.8 nearly as well
_LONGEST = 300  # most steps of a run that nested plans are searched for: this takes seconds, and 1000 steps took more than six minutes
_MIDDLE = 2.0  # speedup of the plan from which nested plans grow and shrink


class NotCoveredError(Exception):
    """A run has times or a number of steps that the calibration does not cover."""


def first_forecast(*calibrations: Calibration | None) -> Forecast | None:
    """Returns the forecast of the first calibration that has one."""
    return next((each.forecast for each in calibrations if each is not None and each.forecast is not None), None)


def check_covered(forecast: Forecast, times: Sequence[float]) -> None:
    """Raises NotCoveredError if a time lies outside the calibrated ones."""
    outside = [time for time in times if not forecast.model.covers(time)]
    if outside:
        reach = f"{forecast.model.times[0]:.3g} to {forecast.model.times[-1]:.3g}"
        raise NotCoveredError(f"it was made for the model's times {reach}, and this run also asks for {outside[0]:.3g}")


def tried_plan_at(forecast: Forecast, steps: int, budget: int) -> TriedPlan:
    """Returns the result of the trials whose share of full evaluations is closest to that of a run.

    Args:
        forecast: The forecast of the calibration.
        steps: Sampler steps of the run.
        budget: Full evaluations of the run.
    """
    share = budget / steps
    return min(forecast.tried, key=lambda tried: abs(tried.plan.count(Kind.FULL) / len(tried.plan) - share))


def origin_plan(origin: str, steps: int, window: range, budget: int) -> Plan:
    """Returns the plan at which a search begins: the front-loaded one for "general", one with even gaps for "even gaps".

    A search ends in the local minimum next to its start, so different starts lead to different plans. Only sampling tells which is better.
    """
    if origin == "general":
        return FrontLoaded(max(steps / budget, 1.0)).plan(steps, window)
    free = [step for step in window if step > 0]
    count = min(max(0, budget - (steps - len(free))), len(free))
    skipped = set(free).difference(free[int((number + 0.5) * len(free) / count)] for number in range(count))
    return Plan.with_full(set(range(steps)) - skipped, steps)


def searched_plan(forecast: Forecast, times: Sequence[float], window: range, budget: int, origin: str, is_corrected: bool) -> Plan:
    """Returns the best plan found from an origin.

    Args:
        forecast: The forecast of the calibration. The plan is kept in `forecast.plans`.
        times: The model's time at every step of the run.
        window: Steps that may be skipped. The first step is full in any case.
        budget: Number of full evaluations.
        origin: Where the search begins, one of `ORIGINS`.
        is_corrected: Whether the run has a `Corrector`.

    Raises:
        NotCoveredError: If a time lies outside the calibrated ones.
    """
    check_covered(forecast, times)
    asked = (tuple(times), window, budget, origin, is_corrected)
    if asked not in forecast.plans:
        search = search_for(forecast.model, times, window, is_corrected)
        forecast.plans[asked] = search.plan(origin_plan(origin, len(times), window, budget))
    return forecast.plans[asked]


def nested_plan(forecast: Forecast, times: Sequence[float], window: range, budget: int, is_corrected: bool) -> Plan:
    """Returns a plan that is part of the plan with one more full evaluation, and nearly as good as the best one with as many.

    So moving a slider for the speed adds or drops single full evaluations. Arguments are those of `searched_plan`; the order of steps is
    kept in `forecast.orders`.

    Raises:
        NotCoveredError: If the run has more than 300 steps, or if a time lies outside the calibrated ones.
    """
    steps, asked = len(times), (tuple(times), window, is_corrected)
    if steps > _LONGEST:
        raise NotCoveredError(f"this run has {steps} steps; plans can be searched for up to {_LONGEST}")
    check_covered(forecast, times)
    if asked not in forecast.orders:
        search = search_for(forecast.model, times, window, is_corrected)
        forecast.orders[asked] = search.order(origin_plan("general", steps, window, max(1, round(steps / _MIDDLE))))
    full = {0, *(step for step in range(steps) if step not in window)}
    full.update([step for step in forecast.orders[asked] if step not in full][: max(0, budget - len(full))])
    return Plan.with_full(full, steps)


def search_for(model: ForecastModel, times: Sequence[float], window: range, is_corrected: bool) -> PlanSearch:
    """Returns a search by the errors of the uncalibrated forecast, because sensitivities were measured with it."""
    made_up = _MADE_UP if is_corrected else 0.0
    return PlanSearch(model.products(times), model.sensitivities(times), AUTO.weights, times, window, AUTO.history, made_up)


def predictor_of(model: ForecastModel, share: float | None) -> Predictor:
    """Returns the predictor with this share of calibrated weights. None is the uncalibrated predictor."""
    return AUTO if share is None else Calibrated(model, share)


def error_of(model: ForecastModel, share: float | None) -> Callable[[Sequence[float], float], float]:
    """Returns a function from (anchor times, time) to the expected square error per token, summed over channels.

    Args:
        model: The statistics.
        share: Share of calibrated weights in the predictor, as in `predictor_of`.
    """
    calibrated = Calibrated(model, share or 0.0)

    def error(anchors: Sequence[float], time: float) -> float:
        if share is None:
            return model.fit(anchors, time, AUTO.weights(anchors, time)).plain_error
        return calibrated.fit(anchors, time).error

    return error

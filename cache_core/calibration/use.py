"""What a calibration recommends for a run, which need not be like the one it was made on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..planning.kinds import Kind
from ..planning.plan import Plan
from ..planning.policies import FrontLoaded
from ..planning.search import PlanSearch
from ..predictors import AUTO, Calibrated, Predictor
from .calibration import Forecast, TriedPlan
from .statistics import ForecastModel

_MADE_UP = 0.5  # of a forecast's error, by correcting: the cost then goes best with what plans are worth; 0.3 and 0.8 do nearly as well
_LONGEST = 300  # steps of a run that nested plans are searched for, which takes seconds; it took more than six minutes with 1000
_MIDDLE = 2.0  # speedup of the plan that nested ones grow and shrink from


class NotCoveredError(Exception):
    """The calibration knows nothing of what a run asks for."""


def check_covered(forecast: Forecast, times: Sequence[float]) -> None:
    """Raises NotCoveredError for times outside the calibrated ones."""
    outside = [time for time in times if not forecast.model.covers(time)]
    if outside:
        reach = f"{forecast.model.times[0]:.3g} to {forecast.model.times[-1]:.3g}"
        raise NotCoveredError(f"it was made for the model's times {reach}, and this run also asks for {outside[0]:.3g}")


def tried_plan_at(forecast: Forecast, steps: int, budget: int) -> TriedPlan:
    """What did best when calibrating with about the same share of full evaluations as `budget` of `steps`."""
    share = budget / steps
    return min(forecast.tried, key=lambda tried: abs(tried.plan.count(Kind.FULL) / len(tried.plan) - share))


def origin_plan(origin: str, steps: int, window: range, budget: int) -> Plan:
    """Where a search begins: at the plan that does best in general ("general") or at even gaps ("even gaps").

    It goes down to the nearest valley, so other starts lead elsewhere, and which is the better plan only samplings can tell.
    """
    if origin == "general":
        return FrontLoaded(max(steps / budget, 1.0)).plan(steps, window)
    free = [step for step in window if step > 0]
    count = min(max(0, budget - (steps - len(free))), len(free))
    skipped = set(free).difference(free[int((place + 0.5) * len(free) / count)] for place in range(count))
    return Plan.with_full(set(range(steps)) - skipped, steps)


def searched_plan(forecast: Forecast, times: Sequence[float], window: range, budget: int, origin: str, is_corrected: bool) -> Plan:
    """The best plan found from an origin with `budget` full evaluations, for a run at `times` (one per step).

    The first step and those outside `window` are full in any case. is_corrected: whether the run makes up for its forecasts (see
    Corrector). Raises NotCoveredError for times outside the calibrated ones.
    """
    check_covered(forecast, times)
    asked = (tuple(times), window, budget, origin, is_corrected)
    if asked not in forecast.plans:
        search = search_for(forecast.model, times, window, is_corrected)
        forecast.plans[asked] = search.plan(origin_plan(origin, len(times), window, budget))
    return forecast.plans[asked]


def nested_plan(forecast: Forecast, times: Sequence[float], window: range, budget: int, is_corrected: bool) -> Plan:
    """The same, but always a part of the plan with one more: nearly as good as the best for its number, and a slider walks along them."""
    steps, asked = len(times), (tuple(times), window, is_corrected)
    if steps > _LONGEST:
        raise NotCoveredError(f"this run has {steps} steps, and plans are searched for up to {_LONGEST}")
    check_covered(forecast, times)
    if asked not in forecast.orders:
        search = search_for(forecast.model, times, window, is_corrected)
        forecast.orders[asked] = search.order(origin_plan("general", steps, window, max(1, round(steps / _MIDDLE))))
    full = {0, *(step for step in range(steps) if step not in window)}
    full.update([step for step in forecast.orders[asked] if step not in full][: max(0, budget - len(full))])
    return Plan.with_full(full, steps)


def search_for(model: ForecastModel, times: Sequence[float], window: range, is_corrected: bool) -> PlanSearch:
    """A search by what the uncalibrated forecast misses, whose sensitivities were measured with it."""
    made_up = _MADE_UP if is_corrected else 0.0
    return PlanSearch(model.products(times), model.sensitivities(times), AUTO.weights, times, window, AUTO.history, made_up)


def predictor_of(model: ForecastModel, share: float | None) -> Predictor:
    """The predictor with this share of calibrated weights; None is the uncalibrated one."""
    return AUTO if share is None else Calibrated(model, share)


def error_of(model: ForecastModel, share: float | None) -> Callable[[Sequence[float], float], float]:
    """What that predictor is expected to miss, from (anchor times, time): square per token, over channels."""
    calibrated = Calibrated(model, share or 0.0)

    def error(anchors: Sequence[float], time: float) -> float:
        if share is None:
            return model.fit(anchors, time, AUTO.weights(anchors, time)).plain_error
        return calibrated.fit(anchors, time).error

    return error

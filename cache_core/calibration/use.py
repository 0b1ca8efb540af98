"""What a calibration recommends for a run, which need not be like the one it was made on."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ..kinds import Kind, Plan
from ..predictors import AUTO, Calibrated, Predictor
from .calibration import Forecast
from .search import PlanSearch
from .statistics import ForecastModel

_SEARCHED = 40  # steps whose order is searched at most


class NotCoveredError(Exception):
    """The calibration knows nothing of what a run asks for."""


def nested_plan(forecast: Forecast, times: Sequence[float], window: range, full: int) -> Plan:
    """The `full` steps whose loss is expected to harm most, in the order in which a search would give them up: a plan with fewer is
    always a part of one with more. The first step and those outside `window` are full in any case.

    What is expected of a forecast is its error with the best weights and no correction: a search asks for thousands. Of more than
    40 steps, every n-th is searched and those between come after, as finding an order takes time with the cube of the steps.
    Raises NotCoveredError for times outside the calibrated ones.
    """
    _check_covered(forecast.model, times)
    steps, asked = len(times), (tuple(times), window)
    if asked not in forecast.orders:
        forecast.orders[asked] = _order(forecast.model, times, window)
    order = forecast.orders[asked]
    chosen = {0, *(step for step in range(steps) if step not in window)}
    chosen.update([step for step in order if step not in chosen][: max(0, full - len(chosen))])
    return Plan(tuple(Kind.FULL if step in chosen else Kind.AGGRESSIVE for step in range(steps)))


def _order(model: ForecastModel, times: Sequence[float], window: range) -> list[int]:
    """Steps by how late a search would give them up."""
    coarse = range(0, len(times), -(-len(times) // _SEARCHED))
    inside = range(*(len([step for step in coarse if step < end]) for end in (window.start, window.stop)))
    taken = [times[step] for step in coarse]
    return [coarse[step] for step in _quick_search(model, taken, inside).order()] + [step for step in window if step not in coarse]


def predictor_at(forecast: Forecast, times: Sequence[float], full: int) -> Predictor:
    """What fills best in a run at `times` (one per step) with about this many full evaluations.

    That is what did best at about the same share of them when calibrating. Raises NotCoveredError for times outside the calibrated ones.
    """
    _check_covered(forecast.model, times)
    share = full / len(times)
    nearest = min(forecast.choices, key=lambda choice: abs(choice.plan.count(Kind.FULL) / len(choice.plan) - share))
    return predictor_of(forecast.model, nearest.share)


def _check_covered(model: ForecastModel, times: Sequence[float]) -> None:
    outside = [time for time in times if not model.covers(time)]
    if outside:
        reach = f"{model.times[0]:.3g} to {model.times[-1]:.3g}"
        raise NotCoveredError(f"it was made for the model's times {reach}, and this run also asks for {outside[0]:.3g}")


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


def _quick_search(model: ForecastModel, times: Sequence[float], window: range) -> PlanSearch:
    """A search by what the best weights miss: rough, but a sampling does not wait for it."""
    return PlanSearch(model.plain_error, model.harm(times), times, window, AUTO.history)


def search_for(model: ForecastModel, share: float | None, times: Sequence[float], window: range) -> PlanSearch:
    """A search by what that predictor is expected to miss."""
    return PlanSearch(error_of(model, share), model.harm(times), times, window, AUTO.history)

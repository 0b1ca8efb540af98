"""What a calibration recommends for a run, which need not be like the one it was made on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from ..kinds import Kind, Plan
from ..predictors import AUTO, Calibrated, Predictor
from .calibration import Choice, Forecast
from .search import PlanSearch
from .statistics import ForecastModel


class Advice(NamedTuple):
    """plan: for every step. predictor: for the skipped ones. is_exact: whether just this was tried out when calibrating."""

    plan: Plan
    predictor: Predictor
    is_exact: bool


class NotCoveredError(Exception):
    """The calibration knows nothing of what a run asks for."""


def advise(forecast: Forecast, times: Sequence[float], window: range, full: int) -> Advice:
    """For a run at `times` (one per step) with about `full` full evaluations; only steps in `window` are skipped.

    The tried plan with the nearest number of full evaluations is taken over by time, and what is too many or too few for `full`
    is dropped or added by expected cost. Raises NotCoveredError for times outside the calibrated ones.
    """
    model = forecast.model
    outside = [time for time in times if not model.covers(time)]
    if outside:
        reach = f"{model.times[0]:.3g} to {model.times[-1]:.3g}"
        raise NotCoveredError(f"it was made for the model's times {reach}, and this run also asks for {outside[0]:.3g}")
    choice = min(forecast.choices, key=lambda c: abs(c.plan.count(Kind.FULL) - full))
    predictor = predictor_of(model, choice.share)
    is_like = len(times) == len(forecast.step_times) and max(abs(a - b) for a, b in zip(times, forecast.step_times)) < 1e-3
    if is_like and choice.plan.count(Kind.FULL) == full and len(window) == len(times):
        return Advice(choice.plan, predictor, True)
    plan = search_for(model, choice.share, times, window).plan(full, start=_taken_over(choice, forecast.step_times, times))
    return Advice(plan, predictor, False)


def _taken_over(choice: Choice, calibrated: Sequence[float], times: Sequence[float]) -> list[int]:
    """The full evaluations of a plan as steps of another schedule: for each the nearest in time that is still free."""
    taken: list[int] = []
    for step, kind in enumerate(choice.plan.kinds):
        free = [other for other in range(len(times)) if other not in taken]
        if kind is Kind.FULL and free:
            taken.append(min(free, key=lambda other: abs(times[other] - calibrated[step])))
    return taken


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


def search_for(model: ForecastModel, share: float | None, times: Sequence[float], window: range) -> PlanSearch:
    """A search by what that predictor is expected to miss."""
    return PlanSearch(error_of(model, share), model.harm(times), times, window, AUTO.history)

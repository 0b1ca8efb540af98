"""Chooses which evaluations are full, by the harm that forecasting the others is expected to do.

METHOD: plan cost = Σ over gaps of (Σ_{i in gap} √(s_i e_i))²: errors within a gap point the same way and add up.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from ..kinds import Kind, Plan
from .statistics import ForecastModel

_HISTORY = 3
_REACH = 3  # how far a full evaluation is moved at most in one exchange


class PlanSearch:
    """Plans for a run at the given times (one per step, noisiest first) with `window` as the steps that may be skipped."""

    def __init__(self, model: ForecastModel, times: Sequence[float], window: range) -> None:
        self._model, self._times = model, tuple(times)
        self._free = [step for step in window if step > 0]
        self._sensitivity = _at_times(model, self._times)
        self._error = lru_cache(maxsize=None)(self._forecast_error)

    def plan(self, full: int) -> Plan:
        """The best plan found with `full` full evaluations (at least those outside the window and the first step).

        Greedy removal from all full, then exchanges of neighbours while they help.
        """
        steps = len(self._times)
        chosen = set(range(steps))
        while len(chosen) > max(full, 1):
            candidates = [step for step in self._free if step in chosen]
            if not candidates:
                break
            chosen.remove(min(candidates, key=lambda step: self.cost(chosen - {step})))
        chosen = self._exchange(chosen)
        return Plan(tuple(Kind.FULL if step in chosen else Kind.AGGRESSIVE for step in range(steps)))

    def cost(self, full: set[int]) -> float:
        """Expected squared deviation of the final latent."""
        total, run = 0.0, 0.0
        anchors: tuple[int, ...] = ()
        for step in range(len(self._times)):
            if step in full:
                anchors = (*anchors, step)[-_HISTORY:]
                total, run = total + run**2, 0.0
            else:
                run += (self._sensitivity[step] * self._error(step, anchors)) ** 0.5
        return total + run**2

    def _exchange(self, chosen: set[int]) -> set[int]:
        best = self.cost(chosen)
        improved = True
        while improved:
            improved = False
            for step in [s for s in self._free if s in chosen]:
                for other in range(step - _REACH, step + _REACH + 1):
                    if other in chosen or other not in self._free or step not in chosen:
                        continue
                    cost = self.cost(chosen - {step} | {other})
                    if cost < best * (1 - 1e-9):
                        chosen, best, improved = chosen - {step} | {other}, cost, True
        return chosen

    def _forecast_error(self, step: int, anchors: tuple[int, ...]) -> float:
        return self._model.fit([self._times[a] for a in anchors], self._times[step]).error


def _at_times(model: ForecastModel, times: Sequence[float]) -> list[float]:
    """Sensitivity per evaluation, interpolated over time; an evaluation that stands for a shorter stretch harms less, squared."""
    if model.sensitivity is None:
        return [1.0] * len(times)
    values = model.sensitivity.tolist()
    recorded = _stretches(model.times)
    result = []
    for time, stretch in zip(times, _stretches(times)):
        nodes = model._nodes(time)
        density = sum(share * values[node] / recorded[node] ** 2 for node, share in nodes)
        result.append(max(density, 0.0) * stretch**2)
    return result


def _stretches(times: Sequence[float]) -> list[float]:
    """How much time each evaluation stands for: up to the next one, the last one down to zero."""
    following = [*times[1:], 0.0]
    return [max(a - b, 1e-6) for a, b in zip(times, following)]

"""Chooses which evaluations are full, by the harm that forecasting the others is expected to do.

METHOD: plan cost = Σ over gaps of (Σ_{i in gap} √(s_i e_i))²: errors within a gap point the same way and add up.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

from ..kinds import Kind, Plan

_REACH = 3  # how far a full evaluation is moved at most in one exchange


class PlanSearch:
    """Plans for a run at the given times (one per step, noisiest first) with `window` as the steps that may be skipped.

    error: expected square of a forecast from (anchor times, time). harm: what a unit of it does to the final latent, per step.
    history: anchors that a forecast sees.
    """

    def __init__(
        self,
        error: Callable[[Sequence[float], float], float],
        harm: Sequence[float],
        times: Sequence[float],
        window: range,
        history: int,
    ) -> None:
        self._times, self._harm, self._history = tuple(times), tuple(harm), history
        self._free = [step for step in window if step > 0]
        self._error = lru_cache(maxsize=None)(lambda step, anchors: error([self._times[a] for a in anchors], self._times[step]))

    def plan(self, full: int) -> Plan:
        """The best plan found with `full` full evaluations; the first step and those outside the window always are.

        Of all steps the least missed are given up, one at a time; then neighbours are exchanged while that helps.
        """
        steps = len(self._times)
        fixed = set(range(steps)).difference(self._free)
        chosen = set(range(steps))
        while len(chosen) > max(full, 1) and (droppable := chosen.difference(fixed)):
            chosen.remove(min(sorted(droppable), key=lambda step: self.cost(chosen - {step})))
        chosen = self._exchange(chosen)
        return Plan(tuple(Kind.FULL if step in chosen else Kind.AGGRESSIVE for step in range(steps)))

    def order(self) -> list[int]:
        """All steps, those first that are given up last: the first step and those outside the window, then by expected cost."""
        fixed = set(range(len(self._times))).difference(self._free)
        chosen, given_up = set(range(len(self._times))), []
        while droppable := sorted(chosen - fixed):
            given_up.append(min(droppable, key=lambda step: self.cost(chosen - {step})))
            chosen.remove(given_up[-1])
        return [*sorted(fixed), *reversed(given_up)]

    def cost(self, full: Collection[int]) -> float:
        """Expected squared deviation of the final latent."""
        total, run = 0.0, 0.0
        anchors: tuple[int, ...] = ()
        for step in range(len(self._times)):
            if step in full:
                anchors = (*anchors, step)[-self._history :]
                total, run = total + run**2, 0.0
            else:
                run += (self._harm[step] * self._error(step, anchors)) ** 0.5
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

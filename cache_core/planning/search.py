"""Searches the plan whose forecasts are expected to change the final latent least.

The forecast of a skipped step i has the error z_i - Σ_j w_ij z_j, which moves the final latent by √s_i times as much, with s_i the
sensitivity of the step. Over a whole run many of these errors cancel, because neighbouring gaps are forecast from the same full
evaluations. So they are added up with their signs. With the unit vectors b_k (one per step) and the inner products G = ⟨z_a, z_b⟩, the
cost of a plan is

    c'Gc    with    c = Σ_i √s_i (b_i - Σ_j w_ij b_j)

The simpler gap cost (docs/method.md, section 5.3) adds errors up without their signs, and inside each gap alone. Among 94 sampled plans of
the demo model with equally many full evaluations, PSNR correlates at -0.87 with the cost used here and at -0.69 with the gap cost
(docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

import numpy as np

from .kinds import Kind
from .plan import Plan

_REACH = 1500  # largest move of a full evaluation in one exchange, times steps of the run: anywhere in 38 steps, by 7 in 200


class PlanSearch:
    """Searches plans for one run.

    Args:
        gram: (n, n), inner products ⟨z_a, z_b⟩ of the hidden states at the n steps of the run.
        sensitivity: s of every step, squared move of the final latent per squared error of the hidden state.
        weights: Weights of a forecast, called with (anchor times, time).
        times: The model's time at every step, noisiest first.
        window: Steps that may be skipped.
        history: Largest number of anchors that a forecast uses.
        made_up: Share 0..1 of a forecast's error that the full evaluation after the gap corrects (see `Corrector`). What is left of this
            share is the error of a line between both ends of the gap. The last full evaluation of a run corrects nothing.
    """

    def __init__(
        self,
        gram: np.ndarray,
        sensitivity: Sequence[float],
        weights: Callable[[Sequence[float], float], Sequence[float]],
        times: Sequence[float],
        window: range,
        history: int,
        made_up: float,
    ) -> None:
        self._gram, self._moves = gram, np.sqrt(sensitivity)
        self._times, self._history, self._made_up = tuple(times), history, made_up
        self._free = [step for step in window if step > 0]
        self._weights = lru_cache(maxsize=None)(lambda anchors, step: weights([self._times[a] for a in anchors], self._times[step]))
        self._gap = lru_cache(maxsize=None)(self._new_gap)

    def plan(self, origin: Plan) -> Plan:
        """Starts from `origin` and exchanges a full step for a skipped one, each time the best exchange, while that lowers the cost."""
        full = origin.steps_of(Kind.FULL)
        cost, reach = self.cost(full), max(_REACH // len(origin), 1)
        while True:
            exchanged = (
                full - {step} | {other}
                for step in self._free
                for other in self._free
                if step in full and other not in full and abs(step - other) <= reach
            )
            best_cost, best = min(((self.cost(plan), sorted(plan)) for plan in exchanged), default=(cost, []))
            if best_cost >= cost * (1 - 1e-9):
                return Plan.with_full(full, len(origin))
            full, cost = frozenset(best), best_cost

    def order(self, origin: Plan) -> list[int]:
        """Returns all steps in an order whose first k steps make a good plan for every k.

        It starts from the best plan found from `origin`. Downwards, it drops one step at a time, the one that raises the cost least.
        Upwards, it adds one step at a time, the one that lowers the cost most.
        """
        middle = self.plan(origin).steps_of(Kind.FULL)
        fixed = set(range(len(origin))).difference(self._free)
        given_up: list[int] = []
        added: list[int] = []
        full = middle
        while droppable := sorted(full - fixed):
            given_up.append(min(droppable, key=lambda step: self.cost(full - {step})))
            full -= {given_up[-1]}
        full = middle
        while left := [step for step in self._free if step not in full]:
            added.append(min(left, key=lambda step: self.cost(full | {step})))
            full |= {added[-1]}
        return [*sorted(fixed), *reversed(given_up), *added]

    def cost(self, full: Collection[int]) -> float:
        """Returns the expected squared move of the final latent with these full steps."""
        steps, c = sorted(full), np.zeros(len(self._times))
        for number, step in enumerate(steps):
            after = steps[number + 1] if number + 1 < len(steps) else len(self._times)
            if after > step + 1:
                c += self._gap(tuple(steps[max(0, number + 1 - self._history) : number + 1]), after, number + 2 < len(steps))
        return float(c @ self._gram @ c)

    def _new_gap(self, anchors: tuple[int, ...], end: int, is_made_up: bool) -> np.ndarray:
        """Returns the part of c that comes from one gap.

        Args:
            anchors: Full steps that the forecast uses; the gap begins after the last one.
            end: First step after the gap.
            is_made_up: Whether the gap is corrected: two full evaluations come after it.
        """
        c, first = np.zeros(len(self._times)), anchors[-1]
        span = self._times[first] - self._times[end] if is_made_up else 0.0
        made_up = self._made_up if span else 0.0  # 0 in models with discrete timesteps, where several small noise levels share one time
        for step in range(first + 1, end):
            move = self._moves[step]
            c[step] += move
            for anchor, weight in zip(anchors, self._weights(anchors, step)):
                c[anchor] -= (1 - made_up) * move * weight
            if made_up:
                part = (self._times[first] - self._times[step]) / span
                c[first] -= made_up * move * (1 - part)
                c[end] -= made_up * move * part
        return c

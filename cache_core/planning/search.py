"""Chooses which evaluations are full, by what forecasting the others is expected to do to the final latent.

The gap cost (docs/method.md, section 5.3) adds errors up within a gap only, and without their signs. But over a run many cancel: what a
forecast gets wrong is made of full evaluations that the next gap's is made of too. Here they are added up with their signs over the whole
run: every skipped step i is off by z_i - Σ_j w_ij z_j and moves the final latent by √s_i of that, so that all together do c'Gc, with
G = ⟨z_a, z_b⟩ and

    c = Σ_i √s_i (e_i - Σ_j w_ij e_j)

Of 94 plans of the demo model that were sampled, those with equally many full evaluations go with it in PSNR at -0.87, with the gap
cost at -0.69 (docs/benchmarks.md).
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import lru_cache

import numpy as np

from .kinds import Kind
from .plan import Plan

_REACH = 1500  # how far a full evaluation is moved at most in one exchange, times steps: anywhere in a run of 38, by 7 in one of 200


class PlanSearch:
    """Plans for a run at the given times (one per step, noisiest first) with `window` as the steps that may be skipped.

    gram (n, n): ⟨z_a, z_b⟩ of the hidden states at the n steps. sensitivity: s, square of the final latent's move per square of error.
    weights: of a forecast, from (anchor times, time). history: anchors that it sees. made_up: share 0..1 of a forecast's error for
    which the full evaluation behind its gap makes up, so that a line between both ends is left (see Corrector); none behind the last.
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
        """From `origin`, the best exchange of a full evaluation for a skipped one, again and again while that helps."""
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
        """All steps, so that the first of them make good plans whatever their number: out from the best plan found from `origin`.

        Of its steps the least missed are given up one at a time, the best of the others come one at a time.
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
        """Expected square of the final latent's move."""
        steps, c = sorted(full), np.zeros(len(self._times))
        for place, step in enumerate(steps):
            after = steps[place + 1] if place + 1 < len(steps) else len(self._times)
            if after > step + 1:
                c += self._gap(tuple(steps[max(0, place + 1 - self._history) : place + 1]), after, place + 2 < len(steps))
        return float(c @ self._gram @ c)

    def _new_gap(self, anchors: tuple[int, ...], end: int, is_made_up: bool) -> np.ndarray:
        """Of c, what the steps between the last anchor and `end` bring. is_made_up: whether two full evaluations are behind them."""
        c, first = np.zeros(len(self._times)), anchors[-1]
        span = self._times[first] - self._times[end] if is_made_up else 0.0
        made_up = self._made_up if span else 0.0  # models with discrete timesteps have one for several small noise levels
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

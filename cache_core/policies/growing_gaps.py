"""Gaps that never shrink and may grow towards the end: a forecast reaches no further than its history spans."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from ..kinds import Kind, Plan


@dataclass(frozen=True)
class GrowingGaps:
    """Full evaluations at round(n · (k/K)^growth), k = 0 … K-1, with the gaps between them sorted; others aggressive.

    Sorting matters more than growth: a long gap after a short one asks a forecast to extrapolate far from a short
    base, which costs up to 4 dB (docs/benchmarks.md).

    speedup: steps divided by full evaluations, at least 1; K = round(steps / speedup).
    growth: 1 gives even gaps with the shorter ones first, more makes early gaps shorter and late ones longer.
    warmup, tail: full steps at both ends of the run; they count towards K.
    Raises ValueError for a speedup or growth below 1 or a negative count.
    """

    speedup: float = 2.0
    growth: float = 1.0
    warmup: int = 1
    tail: int = 0

    def __post_init__(self) -> None:
        if self.speedup < 1:
            raise ValueError(f"speedup must be at least 1, not {self.speedup}")
        if self.growth < 1:
            raise ValueError(f"growth must be at least 1, not {self.growth}")
        if self.warmup < 0 or self.tail < 0:
            raise ValueError(f"warm-up and tail are counts of steps and cannot be negative ({self.warmup}, {self.tail})")

    def plan(self, steps: int, window: range) -> Plan:
        budget = max(1, round(steps / self.speedup))
        first = max(window.start, self.warmup - 1, 0)  # the last of the leading full steps starts the gaps
        last = min(window.stop, steps - self.tail)
        if first >= last:
            return Plan((Kind.FULL,) * steps)
        inside = last - first
        gaps = self._gaps(inside, min(max(budget - (steps - inside), 1), inside))
        full = {*range(first), *range(last, steps), *accumulate(gaps[:-1], initial=first)}
        return Plan(tuple(Kind.FULL if step in full else Kind.AGGRESSIVE for step in range(steps)))

    def _gaps(self, steps: int, count: int) -> list[int]:
        """`count` gaps of at least one step that fill `steps`, shortest first."""
        ends = [round(steps * (k / count) ** self.growth) for k in range(count + 1)]
        gaps = sorted(max(1, end - start) for start, end in pairwise(ends))
        while sum(gaps) > steps:  # early places coincided after rounding: the longest gaps pay for them
            gaps[-1] -= 1
            gaps.sort()
        return gaps

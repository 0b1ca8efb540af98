"""A policy of gaps that never shrink and may grow towards the end, which mode auto was compared with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from comfyui_duca.cache_core import Kind, Plan


@dataclass(frozen=True)
class GrowingGaps:
    """A short first gap, then full evaluations at round(n · (k/K)^growth), with the gaps sorted; others skipped.

    Until a second full evaluation is known a forecast can only repeat the first, hence the short first gap; but two
    full evaluations next to each other are too short a base, hence two steps at least where the average allows. Sorting
    keeps a long gap from following a short one, where a forecast would reach far from a short base. These are
    worth more than growth: together up to 4 dB on the demo model (docs/benchmarks.md).

    speedup: steps divided by full evaluations, at least 1; K = round(steps / speedup).
    growth: 1 gives even gaps, more makes early gaps shorter and late ones longer.
    first_gap: the first gap as a share of the average one; None leaves it to `growth`.
    warmup, tail: full steps at both ends of the run; they count towards K.
    Raises ValueError for a speedup or growth below 1 or a negative count.
    """

    speedup: float = 2.0
    growth: float = 1.0
    first_gap: float | None = 0.6
    warmup: int = 1
    tail: int = 0

    def __post_init__(self) -> None:
        if self.speedup < 1:
            raise ValueError(f"speedup must be at least 1, not {self.speedup}")
        if self.growth < 1:
            raise ValueError(f"growth must be at least 1, not {self.growth}")

    def plan(self, steps: int, window: range) -> Plan:
        budget = max(1, round(steps / self.speedup))
        first = max(window.start, self.warmup - 1, 0)  # the last of the leading full steps starts the gaps
        last = min(window.stop, steps - self.tail)
        if first >= last:
            return Plan((Kind.FULL,) * steps)
        inside = last - first
        gaps = self._gaps(inside, min(max(budget - (steps - inside), 1), inside))
        full = {*range(first), *range(last, steps), *accumulate(gaps[:-1], initial=first)}
        return Plan.with_full(full, steps)

    def _gaps(self, steps: int, count: int) -> list[int]:
        """`count` gaps of at least one step that fill `steps`, shortest first."""
        if self.first_gap is None or count == 1:
            return _grown(steps, count, self.growth)
        average = steps / count
        first = min(max(2 if average >= 2 else 1, round(self.first_gap * average)), steps - count + 1)
        return sorted([first, *_grown(steps - first, count - 1, self.growth)])


def _grown(steps: int, count: int, growth: float) -> list[int]:
    """Gaps between round(steps · (k/count)^growth), sorted."""
    ends = [round(steps * (k / count) ** growth) for k in range(count + 1)]
    gaps = sorted(max(1, end - start) for start, end in pairwise(ends))
    while sum(gaps) > steps:  # early places coincided after rounding: the longest gaps pay for them
        gaps[-1] -= 1
        gaps.sort()
    return gaps

"""A policy whose gaps between full evaluations never shrink and may grow towards the end. Benchmarks compare mode auto with it."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate, pairwise

from comfyui_duca.cache_core import Kind, Plan


@dataclass(frozen=True)
class GrowingGaps:
    """Skips all steps except K full ones, with a short first gap and then gaps that grow.

    After the first gap, full evaluations are at round(n · (k/K)^growth) of the remaining n steps. Then the gaps are sorted.

    The first gap is short because a forecast can only repeat the first full evaluation until there is a second one. It has at least two
    steps if the average gap has, because a forecast from two adjacent full evaluations is poor. Sorting avoids a long gap after a shorter
    one that would need a forecast far beyond its anchors. The first gap and sorting matter more than growth: together they gain up to 4 dB
    on the demo model (docs/benchmarks.md).

    Args:
        speedup: Steps divided by full evaluations, at least 1. K = round(steps / speedup).
        growth: Exponent, at least 1. 1 gives even gaps, and more makes early gaps shorter and late ones longer.
        first_gap: The first gap as a share of the average gap. None takes it from `growth`.
        warmup: Full steps at the beginning of the run. They count towards K.
        tail: Full steps at the end of the run. They count towards K.

    Raises:
        ValueError: If speedup or growth is below 1.
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
        """Returns the plan for a run.

        Args:
            steps: Number of steps.
            window: Steps that may be skipped. The others are full and count towards K.
        """
        budget = max(1, round(steps / self.speedup))
        first = max(window.start, self.warmup - 1, 0)  # gaps are counted from the last of the leading full steps
        last = min(window.stop, steps - self.tail)
        if first >= last:
            return Plan((Kind.FULL,) * steps)
        inside = last - first
        gaps = self._gaps(inside, min(max(budget - (steps - inside), 1), inside))
        full = {*range(first), *range(last, steps), *accumulate(gaps[:-1], initial=first)}
        return Plan.with_full(full, steps)

    def _gaps(self, steps: int, count: int) -> list[int]:
        """Returns `count` gaps of at least one step that add up to `steps`, shortest first."""
        if self.first_gap is None or count == 1:
            return _grown(steps, count, self.growth)
        average = steps / count
        first = min(max(2 if average >= 2 else 1, round(self.first_gap * average)), steps - count + 1)
        return sorted([first, *_grown(steps - first, count - 1, self.growth)])


def _grown(steps: int, count: int, growth: float) -> list[int]:
    """Returns the gaps between the steps round(steps · (k/count)^growth), sorted."""
    ends = [round(steps * (k / count) ** growth) for k in range(count + 1)]
    gaps = sorted(max(1, end - start) for start, end in pairwise(ends))
    while sum(gaps) > steps:  # some gaps were 0 before and became 1, so the longest ones are shortened
        gaps[-1] -= 1
        gaps.sort()
    return gaps

"""Nested plans: a higher speed only takes full evaluations away, the later ones first."""

from __future__ import annotations

from dataclasses import dataclass

from ..kinds import Kind, Plan
from .base import check_counts


@dataclass(frozen=True)
class FrontLoaded:
    """Every second full evaluation goes, from the end of the run to its beginning; then every second of those that are left; and so on.

    So gaps never shrink (after a short one no forecast reaches far), and the plan of a higher speed is always a part of a lower
    one's. Against mode auto's gaps, which are not nested, that costs 3.2 dB at 2x, 0.9 at 2.8x, 0.6 at 4.7x, and nothing at 3.5x
    and 5.6x (docs/benchmarks.md).

    speedup: steps divided by full evaluations, at least 1; round(steps / speedup) of them. warmup, tail: full steps at both ends of the
    run, which count towards these. Raises ValueError for a speedup below 1 or a negative count.
    """

    speedup: float = 2.0
    warmup: int = 1
    tail: int = 0

    def __post_init__(self) -> None:
        if self.speedup < 1:
            raise ValueError(f"speedup must be at least 1, not {self.speedup}")
        check_counts(self.warmup, self.tail)

    def plan(self, steps: int, window: range) -> Plan:
        first = max(window.start, self.warmup - 1, 0)  # the last of the leading full steps starts the gaps
        last = min(window.stop, steps - self.tail)
        free = sorted(range(first + 1, last), key=lambda step: (-_halvings(step - first), step))
        full = {*range(min(first + 1, steps)), *range(max(last, 0), steps)}
        full.update(free[: max(0, max(1, round(steps / self.speedup)) - len(full))])
        return Plan(tuple(Kind.FULL if step in full else Kind.AGGRESSIVE for step in range(steps)))


def _halvings(distance: int) -> int:
    """How often a distance can be halved without a rest."""
    return (distance & -distance).bit_length()

"""A plan written as text, for runs of any length."""

from __future__ import annotations

from dataclasses import dataclass

from ..kinds import Kind, Plan
from ..schedule_text import Pattern
from .base import check_counts


@dataclass(frozen=True)
class Patterned:
    """The pattern over the whole run, but full outside `window`; warmup, tail: full steps at both ends, over what the pattern says.

    Raises ValueError for a negative count.
    """

    pattern: Pattern = Pattern((), (Kind.FULL,))
    warmup: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        check_counts(self.warmup, self.tail)

    def plan(self, steps: int, window: range) -> Plan:
        free = range(max(self.warmup, window.start), min(steps - self.tail, window.stop))
        return Plan(tuple(kind if step in free else Kind.FULL for step, kind in enumerate(self.pattern.fit(steps).kinds)))

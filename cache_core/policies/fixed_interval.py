"""Even gaps: full every N steps, nothing computed between (FORA's and TaylorSeer's schedule)."""

from __future__ import annotations

from dataclasses import dataclass

from ..kinds import Plan
from .base import check_cycle, cycle


@dataclass(frozen=True)
class FixedInterval:
    """interval: steps from one full evaluation to the next; warmup, tail: full steps at both ends of the run."""

    interval: int = 4
    warmup: int = 3
    tail: int = 0

    def __post_init__(self) -> None:
        check_cycle(self.interval, self.warmup, self.tail)

    def plan(self, steps: int, window: range) -> Plan:
        return cycle(steps, window, self.interval, "a", self.warmup, self.tail)

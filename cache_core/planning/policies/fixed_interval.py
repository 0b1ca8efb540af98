"""The policy with even gaps: one full step every N steps, all others skipped, as in FORA and TaylorSeer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import Plan
from .base import Request, check_cycle, cycle


@dataclass(frozen=True)
class FixedInterval:
    """Makes every N-th step full and skips the others.

    Args:
        interval: Steps from one full evaluation to the next.
        warmup, tail: Full steps at the beginning and at the end of the run.

    Raises:
        ValueError: For an `interval` below 1 or a negative number of steps.
    """

    about: ClassVar[str] = "full every N steps"
    takes: ClassVar[frozenset[str]] = frozenset({"speedup", "cycle_length", "costs"})

    interval: int = 4
    warmup: int = 3
    tail: int = 0

    def __post_init__(self) -> None:
        check_cycle(self.interval, self.warmup, self.tail)

    @classmethod
    def asked(cls, request: Request) -> FixedInterval:
        return request.cyclic(cls)

    def plan(self, steps: int, window: range) -> Plan:
        return cycle(steps, window, self.interval, "a", self.warmup, self.tail)

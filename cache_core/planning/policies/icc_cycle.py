"""The policy of ICC (arXiv 2505.05829): one full step every N steps, all others incremental."""

from __future__ import annotations

from dataclasses import dataclass

from ..kinds import Kind
from ..plan import Plan
from .base import Request, check_cycle, cycle


@dataclass(frozen=True)
class IccCycle:
    """Makes every N-th step full and the others incremental, which needs low-rank factors of the model's linear layers.

    The default, every second step, is the authors'.

    Args:
        interval: Steps from one full evaluation to the next.
        warmup, tail: Full steps at the beginning and at the end of the run.

    Raises:
        ValueError: For an `interval` below 1 or a negative number of steps.
    """

    interval: int = 2
    warmup: int = 1
    tail: int = 0

    def __post_init__(self) -> None:
        check_cycle(self.interval, self.warmup, self.tail)

    @classmethod
    def asked(cls, request: Request) -> IccCycle:
        return request.cyclic(cls)

    def plan(self, steps: int, window: range) -> Plan:
        return cycle(steps, window, self.interval, Kind.INCREMENTAL.value, self.warmup, self.tail)

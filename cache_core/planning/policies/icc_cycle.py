"""ICC's schedule (arXiv 2505.05829): full every N steps, incremental between."""

from __future__ import annotations

from dataclasses import dataclass

from ..kinds import Kind
from ..plan import Plan
from .base import Request, check_cycle, cycle


@dataclass(frozen=True)
class IccCycle:
    """F i F i … with the authors' default of every second step; the plan needs factors of the model's linear layers.

    interval: steps from one full evaluation to the next; warmup, tail: full steps at both ends of the run.
    """

    interval: int = 2
    warmup: int = 1
    tail: int = 0

    def __post_init__(self) -> None:
        check_cycle(self.interval, self.warmup, self.tail)

    @classmethod
    def asked(cls, request: Request) -> IccCycle:
        return cls(request.length(lambda n: cls(n, request.warmup, request.tail)), request.warmup, request.tail)

    def plan(self, steps: int, window: range) -> Plan:
        return cycle(steps, window, self.interval, Kind.INCREMENTAL.value, self.warmup, self.tail)

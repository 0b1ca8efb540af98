"""Every evaluation in full: the reference that all others are held against."""

from __future__ import annotations

from dataclasses import dataclass

from ..kinds import Kind
from ..plan import Plan


@dataclass(frozen=True)
class AlwaysCompute:
    def plan(self, steps: int, window: range) -> Plan:
        return Plan((Kind.FULL,) * steps)

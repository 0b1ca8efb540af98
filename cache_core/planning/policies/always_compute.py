"""The policy that computes every evaluation in full, the reference for all others."""

from __future__ import annotations

from dataclasses import dataclass

from ..kinds import Kind
from ..plan import Plan


@dataclass(frozen=True)
class AlwaysCompute:
    """Makes every step full."""

    def plan(self, steps: int, window: range) -> Plan:
        return Plan((Kind.FULL,) * steps)

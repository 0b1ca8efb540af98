"""A plan that was made elsewhere: by a calibration, or by hand."""

from __future__ import annotations

from dataclasses import dataclass

from ..kinds import Kind
from ..plan import Plan


@dataclass(frozen=True)
class Given:
    """The plan as it is, but full outside `window`. Raises ValueError for a run of another length."""

    given: Plan = Plan(())

    def plan(self, steps: int, window: range) -> Plan:
        if steps != len(self.given):
            raise ValueError(f"the plan is for {len(self.given)} steps and this run has {steps}")
        return Plan(tuple(kind if step in window else Kind.FULL for step, kind in enumerate(self.given.kinds)))

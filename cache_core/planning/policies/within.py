"""A policy that applies another policy to a part of the run, given in steps."""

from __future__ import annotations

from dataclasses import dataclass

from ..plan import Plan
from .always_compute import AlwaysCompute
from .base import Policy


@dataclass(frozen=True)
class Within:
    """Applies a policy inside a range of steps and makes the others full.

    Args:
        policy: The policy.
        first: First step of the range, counted from 0.
        end: First step after the range. None is the end of the run.
    """

    policy: Policy = AlwaysCompute()
    first: int = 0
    end: int | None = None

    def plan(self, steps: int, window: range) -> Plan:
        end = window.stop if self.end is None else min(window.stop, self.end)
        start = max(window.start, self.first)
        return self.policy.plan(steps, range(start, max(start, end)))

"""What a policy is, and what the cyclic ones share."""

from __future__ import annotations

from typing import Protocol

from ..kinds import Kind, Plan


class Policy(Protocol):
    """Chooses the kind of every step before sampling starts. Policies are frozen dataclasses."""

    def plan(self, steps: int, window: range) -> Plan:
        """A plan for `steps` sampler steps; every step outside `window` and the first one are full."""
        ...


def cycle(steps: int, window: range, interval: int, between: str, warmup: int, tail: int) -> Plan:
    """`warmup` full steps, then one full step every `interval`, with `between` repeated in the gaps, then `tail` full.

    interval counts steps from one full to the next; warmup and tail count steps of the whole run.
    """
    filling = Plan.parse("F" + between).kinds[1:]
    kinds = []
    start = max(warmup, window.start, 1)
    for step in range(steps):
        position = (step - start) % interval
        free = start <= step < min(steps - tail, window.stop)
        kinds.append(filling[position % len(filling)] if free and position != interval - 1 else Kind.FULL)
    return Plan(tuple(kinds))


def check_cycle(interval: int, warmup: int, tail: int) -> None:
    """Raises ValueError for numbers no cycle can have."""
    if interval < 1:
        raise ValueError(f"the cycle length must be at least 1, not {interval}")
    check_counts(warmup, tail)


def check_counts(warmup: int, tail: int) -> None:
    """Raises ValueError for negative numbers of steps."""
    if warmup < 0 or tail < 0:
        raise ValueError(f"warm-up and tail are counts of steps and cannot be negative ({warmup}, {tail})")

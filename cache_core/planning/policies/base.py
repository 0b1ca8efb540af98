"""What a policy is, what a user asks of one, and what the cyclic ones share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol

from ..kinds import Kind
from ..plan import Plan
from ..text import parse


class Policy(Protocol):
    """Chooses the kind of every step before sampling starts. Policies are frozen dataclasses.

    One that users may choose is an `OfferedPolicy` as well.
    """

    def plan(self, steps: int, window: range) -> Plan:
        """A plan for `steps` sampler steps; every step outside `window` and the first one are full."""
        ...


class OfferedPolicy(Policy, Protocol):
    """A policy that users may choose by its name in `POLICIES`.

    about: What it does, for tooltips. takes: The fields of `Request` that it goes by, apart from warmup and tail.
    """

    about: ClassVar[str]
    takes: ClassVar[frozenset[str]]

    @classmethod
    def asked(cls, request: Request) -> Policy:
        """Makes it for a run. Raises ValueError for what cannot be, in words for the user."""
        ...


@dataclass(frozen=True)
class Request:
    """What a user asks of a policy, for one run.

    Args:
        steps: Sampler steps of the run.
        speedup: Wanted number of steps per full evaluation, at least 1.
        cycle_length: Steps from one full evaluation to the next. 0 leaves it to `speedup`.
        warmup, tail: Full steps at both ends.
        text: A schedule that the user wrote; see `planning.text`.
        costs: What an evaluation of each kind costs, in full ones; 0 where it is not named.
        searched: The best plan found for a number of full evaluations, from a calibration. None without one.
    """

    steps: int
    speedup: float = 2.0
    cycle_length: int = 0
    warmup: int = 1
    tail: int = 0
    text: str = ""
    costs: Mapping[Kind, float] = field(default_factory=lambda: {Kind.FULL: 1.0})
    searched: Callable[[int], Plan] | None = None

    def length(self, cycle: Callable[[int], Policy]) -> int:
        """The cycle length that was asked for, or the shortest one whose evaluations cost little enough for the speedup.

        cycle: makes the policy of a cycle length.
        """
        return self.cycle_length or next((n for n in range(1, self.steps + 1) if self._is_met(cycle(n))), max(self.steps, 1))

    def _is_met(self, policy: Policy) -> bool:
        plan = policy.plan(self.steps, range(self.steps))
        total = sum(cost * plan.count(kind) for kind, cost in self.costs.items())
        return total * self.speedup <= self.steps * 1.02


def cycle(steps: int, window: range, interval: int, between: str, warmup: int, tail: int) -> Plan:
    """`warmup` full steps, then one full step every `interval`, with `between` repeated in the gaps, then `tail` full.

    interval counts steps from one full to the next; warmup and tail count steps of the whole run.
    """
    filling = parse("F" + between).loop[1:]
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

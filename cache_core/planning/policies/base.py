"""The interface of policies, the request that a user makes of one, and helpers for cyclic policies."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Protocol, TypeVar

from ..kinds import Kind
from ..plan import Plan
from ..text import parse


class Policy(Protocol):
    """Chooses the kind of every step before sampling starts. Policies are frozen dataclasses.

    A policy that users may choose is also an `OfferedPolicy`.
    """

    def plan(self, steps: int, window: range) -> Plan:
        """Returns a plan for a run.

        Args:
            steps: Sampler steps of the run.
            window: Steps that need not be full. All others, and the first step, are full.
        """
        ...


class OfferedPolicy(Policy, Protocol):
    """A policy that users may choose by its name in `POLICIES`.

    Attributes:
        about: What it does, for tooltips.
        takes: Names of the fields of `Request` that it uses, apart from `warmup` and `tail`.
    """

    about: ClassVar[str]
    takes: ClassVar[frozenset[str]]

    @classmethod
    def asked(cls, request: Request) -> Policy:
        """Makes the policy for a request.

        Raises:
            ValueError: If the request cannot be met, with a message for the user.
            NotCoveredError: If `request.searched` is called for a run that the calibration does not cover.
        """
        ...


_Cyclic = TypeVar("_Cyclic", bound=Policy)


@dataclass(frozen=True)
class Request:
    """What a user asks of a policy, for one run.

    Args:
        steps: Sampler steps of the run.
        speedup: Number of steps divided by the cost of the plan in full evaluations (see `costs`), at least 1.
        cycle_length: Steps from one full evaluation to the next. 0 follows `speedup`.
        warmup, tail: Full steps at the beginning and at the end.
        text: A schedule that the user wrote, in the form of `planning.text`.
        costs: Cost of an evaluation of each kind, as a share of a full one. A kind without an entry costs nothing.
        searched: Returns the best plan that a calibration finds with a given number of full evaluations. None without a calibration.
    """

    steps: int
    speedup: float = 2.0
    cycle_length: int = 0
    warmup: int = 1
    tail: int = 0
    text: str = ""
    costs: Mapping[Kind, float] = field(default_factory=lambda: {Kind.FULL: 1.0})
    searched: Callable[[int], Plan] | None = None

    def cyclic(self, make: Callable[..., _Cyclic]) -> _Cyclic:
        """Returns the policy with `cycle_length` or, if it is 0, with the shortest cycle whose plan is cheap enough for `speedup`.

        If none is, the cycle is as long as the run.

        Args:
            make: Makes the policy from a cycle length, `warmup` and `tail`.
        """
        if self.cycle_length:
            return make(self.cycle_length, warmup=self.warmup, tail=self.tail)
        policies = (make(length, warmup=self.warmup, tail=self.tail) for length in range(1, self.steps + 1))
        return next((policy for policy in policies if self._is_met(policy)), make(max(self.steps, 1), warmup=self.warmup, tail=self.tail))

    def _is_met(self, policy: Policy) -> bool:
        """Returns whether the plan costs at most 2 % more than `speedup` allows."""
        plan = policy.plan(self.steps, range(self.steps))
        total = sum(cost * plan.count(kind) for kind, cost in self.costs.items())
        return total * self.speedup <= self.steps * 1.02


def cycle(steps: int, window: range, interval: int, between: str, warmup: int, tail: int) -> Plan:
    """Makes the plan of a cycle.

    Args:
        steps: Sampler steps of the run.
        window: Steps that need not be full.
        interval: Steps from one full step to the next.
        between: Letters of the kinds that fill each gap, repeated as often as they fit.
        warmup, tail: Full steps at the beginning and at the end of the run.
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
    """Raises ValueError for an interval below 1 or a negative number of steps."""
    if interval < 1:
        raise ValueError(f"the cycle length must be at least 1, not {interval}")
    check_counts(warmup, tail)


def check_counts(warmup: int, tail: int) -> None:
    """Raises ValueError for negative numbers of steps."""
    if warmup < 0 or tail < 0:
        raise ValueError(f"warm-up and tail are counts of steps and cannot be negative ({warmup}, {tail})")

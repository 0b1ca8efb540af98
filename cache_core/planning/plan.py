"""A plan: the kind of evaluation at every step of a run."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

from .kinds import Kind
from .text import ScheduleTextError, parse


@dataclass(frozen=True)
class Plan:
    """The kind of evaluation at every sampler step, first step first.

    Evaluations are matched to steps by noise level, so a sampler that evaluates the model twice per step gets the step's kind twice (see
    `Timeline.step_of`).

    Args:
        kinds: One kind per step.

    Raises:
        ValueError: If the first step is not full.
    """

    kinds: tuple[Kind, ...]

    def __post_init__(self) -> None:
        if self.kinds and self.kinds[0] is not Kind.FULL:
            raise ValueError("the first step of a plan must be full: there is nothing to reuse yet")

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Reads a plan from a text in the form of `planning.text` that names every step once.

        Raises:
            ScheduleTextError: If the text cannot be read, or repeats a part to the end of a run with `*`.
        """
        pattern = parse(text)
        if "*" in text:
            raise ScheduleTextError("a plan must name every step, so * cannot be used", text, text.index("*"))
        return cls(pattern.loop)

    @classmethod
    def with_full(cls, full: Collection[int], steps: int) -> Plan:
        """Makes the plan that is full at the given steps and skipped at all others.

        Raises:
            ValueError: If step 0 is not among the given ones.
        """
        return cls(tuple(Kind.FULL if step in full else Kind.SKIPPED for step in range(steps)))

    def __str__(self) -> str:
        return "".join(kind.value for kind in self.kinds)

    def __len__(self) -> int:
        return len(self.kinds)

    def __getitem__(self, step: int) -> Kind:
        return self.kinds[step]

    def count(self, kind: Kind) -> int:
        return self.kinds.count(kind)

    def steps_of(self, kind: Kind) -> frozenset[int]:
        return frozenset(step for step, own in enumerate(self.kinds) if own is kind)

    def has(self, kind: Kind, since: int = 0) -> bool:
        """Returns whether step `since` or a later one is of this kind."""
        return kind in self.kinds[since:]

    @property
    def skips(self) -> bool:
        """Whether any step is not full."""
        return any(kind is not Kind.FULL for kind in self.kinds)

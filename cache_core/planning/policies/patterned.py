"""The policy that a user writes as text, for runs of any length."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..kinds import Kind
from ..plan import Plan
from ..text import Pattern, parse
from .base import Request, check_counts


@dataclass(frozen=True)
class Patterned:
    """Spreads a pattern over the whole run, but makes steps outside the window full.

    Args:
        pattern: The pattern.
        warmup, tail: Steps at the beginning and at the end of the run that are full whatever the pattern says.

    Raises:
        ValueError: For a negative number of steps.
    """

    about: ClassVar[str] = "what you write in text"
    takes: ClassVar[frozenset[str]] = frozenset({"text"})

    pattern: Pattern = Pattern((), (Kind.FULL,))
    warmup: int = 0
    tail: int = 0

    def __post_init__(self) -> None:
        check_counts(self.warmup, self.tail)

    @classmethod
    def asked(cls, request: Request) -> Patterned:
        """Makes the policy from the text of a request.

        Raises:
            ScheduleTextError: If the text cannot be read.
        """
        return cls(parse(request.text), request.warmup, request.tail)

    def plan(self, steps: int, window: range) -> Plan:
        free = range(max(self.warmup, window.start), min(steps - self.tail, window.stop))
        return Plan(tuple(kind if step in free else Kind.FULL for step, kind in enumerate(self.pattern.fit(steps))))

"""The kinds of model evaluation and how a schedule of them is written."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """What one model evaluation does. The value is its letter in a schedule's text."""

    FULL = "F"  # every block runs: the host's own code, listened to
    CALIBRATED = "i"  # blocks run over low-rank increments of their linear layers (ICC)
    CONSERVATIVE = "c"  # attention from the cache, MLP for a share of the tokens (DuCa)
    AGGRESSIVE = "a"  # no block runs: the stack's output is reused or forecast

    @property
    def label(self) -> str:
        return self.name.lower()


@dataclass(frozen=True)
class Plan:
    """The kind of evaluation at every sampler step, first step first.

    Evaluations are matched to steps by noise level, so a sampler that evaluates the model
    twice per step gets the step's kind twice (see `Timeline.step_of`).
    """

    kinds: tuple[Kind, ...]

    def __post_init__(self) -> None:
        if self.kinds and self.kinds[0] is not Kind.FULL:
            raise ValueError("the first step of a plan must be full: there is nothing to reuse yet")

    @classmethod
    def parse(cls, text: str) -> Plan:
        """Reads the letters F, i, c and a; spaces do not count. Raises ValueError on any other."""
        kinds = []
        for position, letter in enumerate(text):
            if letter.isspace():
                continue
            try:
                kinds.append(Kind(letter))
            except ValueError:
                raise ValueError(f"unknown kind {letter!r} at character {position + 1} of {text!r}: use F, i, c or a") from None
        return cls(tuple(kinds))

    @classmethod
    def with_full(cls, full: Collection[int], steps: int) -> Plan:
        """Full at the given steps, aggressive at all others."""
        return cls(tuple(Kind.FULL if step in full else Kind.AGGRESSIVE for step in range(steps)))

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
        """Whether a step from `since` on, itself included, is of this kind."""
        return kind in self.kinds[since:]

    @property
    def skips(self) -> bool:
        """Whether any step is not full."""
        return any(kind is not Kind.FULL for kind in self.kinds)

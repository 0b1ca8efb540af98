"""The policy of DuCa (arXiv 2412.18911): one full step, then conservative and skipped steps in turn."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..kinds import Kind
from ..plan import Plan
from .base import Request, check_cycle, cycle


@dataclass(frozen=True)
class DucaCycle:
    """Repeats F c a c a. The defaults are the paper's setting for FLUX.

    Args:
        cycle_length: Steps from one full evaluation to the next, N in the paper.
        between: Letters of the kinds between full steps. "ca" is DuCa. "c" is the all-conservative form of ToCa, and FORA with a token
            share of 0.
        warmup, tail: Full steps at the beginning and at the end of the run.

    Raises:
        ValueError: For a `cycle_length` below 1, a negative number of steps, or other letters than c and a.
    """

    about: ClassVar[str] = "full, conservative (attention from the cache, some tokens recomputed) and skipped in turn"
    takes: ClassVar[frozenset[str]] = frozenset({"speedup", "cycle_length", "costs"})

    cycle_length: int = 5
    between: str = "ca"
    warmup: int = 3
    tail: int = 0

    def __post_init__(self) -> None:
        check_cycle(self.cycle_length, self.warmup, self.tail)
        if not self.between or set(self.between) - {Kind.CONSERVATIVE.value, Kind.SKIPPED.value}:
            raise ValueError(f"a cycle is filled with c and a, not {self.between!r}")

    @classmethod
    def asked(cls, request: Request) -> DucaCycle:
        return request.cyclic(cls)

    def plan(self, steps: int, window: range) -> Plan:
        return cycle(steps, window, self.cycle_length, self.between, self.warmup, self.tail)

"""DuCa's cycle (arXiv 2412.18911): full once, then conservative and aggressive in turn."""

from __future__ import annotations

from dataclasses import dataclass

from ..kinds import Kind, Plan
from .base import check_cycle, cycle


@dataclass(frozen=True)
class DucaCycle:
    """F c a c a F c a c a … with the paper's FLUX setting as default.

    cycle_length: N, steps from one full evaluation to the next.
    between: what fills a cycle; "ca" is DuCa, "c" ToCa's all-conservative form (FORA with a token share of 0).
    warmup, tail: full steps at the beginning and the end of the run.
    """

    cycle_length: int = 5
    between: str = "ca"
    warmup: int = 3
    tail: int = 0

    def __post_init__(self) -> None:
        check_cycle(self.cycle_length, self.warmup, self.tail)
        if not self.between or set(self.between) - {Kind.CONSERVATIVE.value, Kind.AGGRESSIVE.value}:
            raise ValueError(f"a cycle is filled with c and a, not {self.between!r}")

    def plan(self, steps: int, window: range) -> Plan:
        return cycle(steps, window, self.cycle_length, self.between, self.warmup, self.tail)

"""Gaps that grow towards the end: early evaluations decide the picture, late ones change little."""

from __future__ import annotations

from dataclasses import dataclass

from ..kinds import Kind, Plan


@dataclass(frozen=True)
class GrowingGaps:
    """Full evaluations at round(n · (k/K)^growth), k = 0 … K-1; all others aggressive.

    speedup: steps divided by full evaluations, at least 1; K = round(steps / speedup).
    growth: 1 spaces evenly, more puts full evaluations earlier. Our measurements, see docs/benchmarks.md.
    warmup, tail: full steps at both ends of the run; they count towards K.
    Raises ValueError for a speedup or growth below 1 or a negative count.
    """

    speedup: float = 2.0
    growth: float = 1.35
    warmup: int = 1
    tail: int = 0

    def __post_init__(self) -> None:
        if self.speedup < 1:
            raise ValueError(f"speedup must be at least 1, not {self.speedup}")
        if self.growth < 1:
            raise ValueError(f"growth must be at least 1, not {self.growth}")
        if self.warmup < 0 or self.tail < 0:
            raise ValueError(f"warm-up and tail are counts of steps and cannot be negative ({self.warmup}, {self.tail})")

    def plan(self, steps: int, window: range) -> Plan:
        budget = max(1, round(steps / self.speedup))
        first = max(window.start, self.warmup - 1, 0)  # the last of the leading full steps starts the gaps
        last = min(window.stop, steps - self.tail)
        if first >= last:
            return Plan((Kind.FULL,) * steps)
        free = last - first
        full = set(range(first)) | set(range(last, steps)) | {first + i for i in self._positions(free, budget - (steps - free))}
        return Plan(tuple(Kind.FULL if step in full else Kind.AGGRESSIVE for step in range(steps)))

    def _positions(self, free: int, budget: int) -> set[int]:
        """`budget` of `free` places (at least one, the first), denser at the beginning."""
        budget = min(max(budget, 1), free)
        places = {min(free - 1, round(free * (k / budget) ** self.growth)) for k in range(budget)}
        for place in range(free):  # early places may coincide after rounding: fill from the front
            if len(places) >= budget:
                break
            places.add(place)
        return places

"""A schedule as a user asks for it: which evaluations are full, apart from how the others are filled."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from .calibration.calibration import Calibration
from .calibration.use import NotCoveredError, nested_plan
from .checks import check_count, check_kind, check_number, check_one_of
from .kinds import Kind
from .opening import Opening
from .policies import DucaCycle, FixedInterval, FrontLoaded, Given, Patterned, Policy, Within
from .schedule_text import parse

# A conservative evaluation's cost as a share of a full one per share of tokens, for choosing a cycle before shapes
# are known: 0.071 at share 0.1 for FLUX at 1024². The meter counts the real one.
CONSERVATIVE_COST = 0.7


@dataclass(frozen=True)
class Schedule:
    """kind: one of KINDS. speedup: wanted number of evaluations per full one, at least 1; a cycle follows it where cycle_length is 0.

    text: for kind "custom text" (see schedule_text). unit: of skip_from and skip_to, between which evaluations may be skipped: "percent"
    of the sampling (0..100) or "steps" (from 0; 0 for skip_to is the end). warmup, tail: full steps at both ends.
    first_only: where a sampler evaluates a step several times, only the first of these computes.
    calibration: for kind "searched". Raises ValueError for what cannot be, a ScheduleTextError for the text.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("front-loaded", "DuCa cycle", "fixed interval", "searched", "custom text")
    UNITS: ClassVar[tuple[str, ...]] = ("percent", "steps")

    kind: str = "front-loaded"
    speedup: float = 2.0
    cycle_length: int = 0
    text: str = "3F (Fca)* F"
    unit: str = "percent"
    skip_from: float = 0.0
    skip_to: float = 100.0
    warmup: int = 1
    tail: int = 0
    first_only: bool = False
    calibration: Calibration | None = None

    def __post_init__(self) -> None:
        check_one_of("schedule", self.kind, self.KINDS)
        check_one_of("unit", self.unit, self.UNITS)
        check_number("speedup", self.speedup, 1)
        for name, steps in (("cycle length", self.cycle_length), ("warm-up", self.warmup), ("tail", self.tail)):
            check_count(name, steps)
        check_number("skip_from", self.skip_from, 0)
        check_number("skip_to", self.skip_to, 0)
        if self.unit == "percent" and not self.skip_from <= self.skip_to <= 100:
            raise ValueError(f"skip_from and skip_to are percent with skip_from <= skip_to, not {self.skip_from:g} and {self.skip_to:g}")
        if self.unit == "steps" and 0 < self.skip_to < self.skip_from:
            raise ValueError(f"skip_from and skip_to are steps with skip_from <= skip_to, not {self.skip_from:g} and {self.skip_to:g}")
        check_kind("calibration", self.calibration, Calibration, "SVD Calibrator or Load Calibration")
        if self.kind == "custom text":
            parse(self.text)

    @property
    def part(self) -> tuple[float, float]:
        """The part 0..1 of the sampling in which evaluations may be skipped; all of it where that is said in steps."""
        return (self.skip_from / 100, self.skip_to / 100) if self.unit == "percent" else (0.0, 1.0)

    @property
    def needs(self) -> tuple[bool, bool]:
        """Whether it takes a calibrated forecast, and low-rank factors."""
        return self.kind == "searched", self.kind == "custom text" and parse(self.text).has(Kind.CALIBRATED)

    @property
    def name(self) -> str:
        if self.kind == "custom text":
            return f"custom {self.text.strip()}"
        in_cycles = self.cycle_length and self.kind in ("DuCa cycle", "fixed interval")
        return f"{self.kind} {f'N={self.cycle_length}' if in_cycles else f'{self.speedup:g}x'}"

    def policy(self, opening: Opening, token_share: float, calibration: Calibration | None) -> tuple[Policy, tuple[str, ...]]:
        """When to compute in a run, and what to tell the user. calibration: of the checkpoint, where the schedule has none of its own.

        Raises ValueError for kind "searched" without a calibrated forecast.
        """
        policy, notices = self._whole(opening, token_share, self.calibration or calibration)
        if self.unit == "steps":
            policy = Within(policy, round(self.skip_from), round(self.skip_to) or None)
        return policy, notices

    def _whole(self, opening: Opening, token_share: float, calibration: Calibration | None) -> tuple[Policy, tuple[str, ...]]:
        steps = opening.timeline.steps
        if self.kind == "custom text":
            return Patterned(parse(self.text), self.warmup, self.tail), ()
        if self.kind == "DuCa cycle":
            return duca_cycle(steps, self.speedup, self.cycle_length, token_share, self.warmup, self.tail), ()
        if self.kind == "fixed interval":
            length = self.cycle_length or shortest(
                lambda n: FixedInterval(n, self.warmup, self.tail), steps, self.speedup, {Kind.FULL: 1.0}
            )
            return FixedInterval(length, self.warmup, self.tail), ()
        return self._searched(opening, calibration) if self.kind == "searched" else (self._front_loaded(), ())

    def _front_loaded(self) -> Policy:
        return FrontLoaded(self.speedup, self.warmup, self.tail)

    def _searched(self, opening: Opening, calibration: Calibration | None) -> tuple[Policy, tuple[str, ...]]:
        if calibration is None or calibration.forecast is None:
            raise ValueError(
                "a searched schedule needs a calibrated forecast of this model: run SVD Calibrator first, or choose another kind"
            )
        times = opening.timeline.times[:-1]
        window = range(max(opening.window.start, self.warmup), min(opening.window.stop, len(times) - self.tail))
        if self.unit == "steps":
            end = round(self.skip_to) or len(times)
            window = range(max(window.start, round(self.skip_from)), min(window.stop, end))
        try:
            full = max(2, round(len(times) / self.speedup))
            return Given(nested_plan(calibration.forecast, times, window, full, opening.is_euler)), ()
        except NotCoveredError as reason:
            return self._front_loaded(), (f"no schedule can be searched, a front-loaded one is used: {reason}",)


def duca_cycle(steps: int, speedup: float, cycle_length: int, token_share: float, warmup: int, tail: int) -> DucaCycle:
    """The given cycle length, or the shortest one whose estimated cost meets the speedup."""
    costs = {Kind.FULL: 1.0, Kind.CONSERVATIVE: CONSERVATIVE_COST * token_share}
    length = cycle_length or shortest(lambda n: DucaCycle(n, warmup=warmup, tail=tail), steps, speedup, costs)
    return DucaCycle(length, warmup=warmup, tail=tail)


def shortest(cycle: Callable[[int], Policy], steps: int, speedup: float, costs: Mapping[Kind, float]) -> int:
    """The shortest cycle whose evaluations cost little enough for the speedup; costs: in full ones, 0 where not named."""
    for length in range(1, steps + 1):
        plan = cycle(length).plan(steps, range(steps))
        total = sum(cost * plan.count(kind) for kind, cost in costs.items())
        if total * speedup <= steps * 1.02:
            return length
    return max(steps, 1)

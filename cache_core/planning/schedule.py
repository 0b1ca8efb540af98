"""The schedule that a user asks for: which steps are full. How the others are filled is not a part of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from ..calibration.calibration import Calibration
from ..calibration.use import NotCoveredError, first_forecast, nested_plan
from ..checks import check_count, check_number, check_one_of, check_type
from ..run_start import RunStart
from .kinds import Kind
from .policies import POLICIES, FrontLoaded, Policy, Request, Within
from .text import parse


@dataclass(frozen=True)
class Schedule:
    """What a user asks of Cache Schedule.

    Args:
        policy: A name in `POLICIES`.
        speedup: Number of steps divided by the cost of the plan in full evaluations, at least 1. Skipped steps cost nothing.
        cycle_length: Steps from one full evaluation to the next, for policies with a cycle. 0 follows `speedup`.
        text: The schedule in the form of `planning.text`, for policy "custom text".
        unit: Unit of `skip_from` and `skip_to`: "percent" of the sampling (0..100) or "steps" (counted from 0).
        skip_from, skip_to: Part of the run in which steps may be skipped. With "steps", step `skip_to` itself is full, and 0 is the end of
            the run.
        warmup, tail: Full steps at the beginning and at the end.
        first_only: If a sampler evaluates a step several times, only the first evaluation is of the plan's kind and the others are skipped.
        calibration: Calibration of the model, for policy "searched".

    Raises:
        ValueError: For a value that is not allowed, with a message for the user. For the text it is a ScheduleTextError.
    """

    UNITS: ClassVar[tuple[str, ...]] = ("percent", "steps")

    policy: str = "front-loaded"
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
        check_one_of("schedule", self.policy, POLICIES)
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
        check_type("calibration", self.calibration, Calibration, "SVD Calibrator or Load Calibration")
        if self.is_written:
            parse(self.text)

    @property
    def part(self) -> tuple[float, float]:
        """The part 0..1 of the sampling in which evaluations may be skipped. The whole, if the part is given in steps."""
        return (self.skip_from / 100, self.skip_to / 100) if self.unit == "percent" else (0.0, 1.0)

    @property
    def needs_forecast(self) -> bool:
        """Whether it needs a calibrated forecast."""
        return self._takes("searched")

    @property
    def is_written(self) -> bool:
        """Whether it is the user's own text."""
        return self._takes("text")

    @property
    def needs_factors(self) -> bool:
        """Whether it needs low-rank factors."""
        return self.is_written and parse(self.text).has(Kind.INCREMENTAL)

    @property
    def name(self) -> str:
        """The name of the schedule in reports."""
        if self.is_written:
            return f"custom {self.text.strip()}"
        in_cycles = self.cycle_length and self._takes("cycle_length")
        return f"{self.policy} {f'N={self.cycle_length}' if in_cycles else f'{self.speedup:g}x'}"

    def policy_for(self, start: RunStart, costs: Mapping[Kind, float], calibration: Calibration | None) -> tuple[Policy, tuple[str, ...]]:
        """Returns the policy of a run and notices for the user.

        Args:
            start: The run.
            costs: Cost of an evaluation of each kind, as a share of a full one.
            calibration: Calibration of the checkpoint, used if the schedule has none of its own.

        Raises:
            ValueError: For policy "searched" without a calibrated forecast.
        """
        notices: tuple[str, ...] = ()
        try:
            policy = POLICIES[self.policy].asked(self._request(start, costs, self.calibration, calibration))
        except NotCoveredError as reason:
            policy = FrontLoaded(self.speedup, self.warmup, self.tail)
            notices = (f"no plan can be searched for this run, so a front-loaded one is used: {reason}",)
        if self.unit == "steps":
            policy = Within(policy, round(self.skip_from), round(self.skip_to) or None)
        return policy, notices

    def _takes(self, field: str) -> bool:
        """Returns whether the policy uses this field of a `Request`."""
        return field in POLICIES[self.policy].takes

    def _request(self, start: RunStart, costs: Mapping[Kind, float], *calibrations: Calibration | None) -> Request:
        """Returns what the schedule asks of its policy in a run."""
        forecast = first_forecast(*calibrations)
        times, window = start.timeline.times[:-1], self._window(start)
        return Request(
            steps=start.timeline.steps,
            speedup=self.speedup,
            cycle_length=self.cycle_length,
            warmup=self.warmup,
            tail=self.tail,
            text=self.text,
            costs=costs,
            searched=None if forecast is None else lambda budget: nested_plan(forecast, times, window, budget, start.is_euler),
        )

    def _window(self, start: RunStart) -> range:
        """Returns the steps that a search may skip."""
        steps = start.timeline.steps
        window = range(max(start.window.start, self.warmup), min(start.window.stop, steps - self.tail))
        if self.unit == "steps":
            window = range(max(window.start, round(self.skip_from)), min(window.stop, round(self.skip_to) or steps))
        return window

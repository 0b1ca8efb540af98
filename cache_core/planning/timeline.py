"""Finds the step of an evaluation from its noise level alone.

Counting calls would go wrong with samplers that evaluate the model several times per step, that start in the middle of the noise levels or
that step back.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

_ON_STEP = 0.01  # a level above a step's own by less than this share of the gap to the step before still counts as the step's


class Timeline:
    """The noise levels of a sampler and the model's time at each.

    Args:
        sigmas: n+1 noise levels for n steps, never rising.
        times: The model's time at each noise level, scaled to 0..1. By default sigma / first sigma.

    Raises:
        ValueError: If the levels rise, if there are fewer than two, or if there are not as many times.
    """

    def __init__(self, sigmas: Sequence[float], times: Sequence[float] | None = None) -> None:
        self.sigmas = tuple(float(s) for s in sigmas)
        if len(self.sigmas) < 2:
            raise ValueError("a sampling run needs at least one step (two noise levels)")
        if any(b > a for a, b in zip(self.sigmas, self.sigmas[1:])):
            raise ValueError("the noise levels of this run rise; the cache needs levels that fall from step to step")
        top = self.sigmas[0] or 1.0
        self.times = tuple(float(t) for t in times) if times is not None else tuple(s / top for s in self.sigmas)
        if len(self.times) != len(self.sigmas):
            raise ValueError(f"{len(self.sigmas)} noise levels but {len(self.times)} times")
        gaps = [0.0] + [a - b for a, b in zip(self.sigmas, self.sigmas[1:])]
        self._thresholds = [-(s + _ON_STEP * gap) for s, gap in zip(self.sigmas[:-1], gaps)]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def step_of(self, sigma: float) -> int:
        """Returns the step that an evaluation at `sigma` belongs to: the last one whose noise level is not below it.

        A level between those of two steps (dpm_2, SDE samplers) belongs to the earlier step, unless it is above that of the later one by no
        more than 1 % of the gap, as by rounding. A level above that of the first step (churn) belongs to step 0.
        """
        return max(0, bisect_right(self._thresholds, -sigma) - 1)

    def time_of(self, sigma: float) -> float:
        """Returns the model's time at `sigma`, interpolated linearly between noise levels and constant beyond both ends."""
        if sigma >= self.sigmas[0]:
            return self.times[0]
        for (high, low), (t_high, t_low) in zip(zip(self.sigmas, self.sigmas[1:]), zip(self.times, self.times[1:]), strict=True):
            if sigma >= low and high > low:
                return t_low + (t_high - t_low) * (sigma - low) / (high - low)
        return self.times[-1]

    def window(self, start_sigma: float, end_sigma: float) -> range:
        """Returns the steps that may be skipped: those with a noise level from `end_sigma` (the lower one) to `start_sigma`."""
        inside = [i for i, s in enumerate(self.sigmas[:-1]) if end_sigma <= s <= start_sigma]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

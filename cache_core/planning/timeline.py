"""Where an evaluation stands in a sampling run, from its noise level alone.

Counting calls goes wrong with samplers that evaluate the model several times per step, that start in the
middle of a schedule or that step back; the noise level does not.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

_ON_SCHEDULE = 0.01  # share of the gap above a step within which a noise level still counts as that step's own


class Timeline:
    """A sampler's noise levels, descending, and the model's time coordinate at each.

    sigmas: n+1 noise levels for n steps, never rising.
    times: the model's time at each sigma, scaled to 0..1; default: sigma / first sigma.
    Raises ValueError when the levels rise or there are fewer than two.
    """

    def __init__(self, sigmas: Sequence[float], times: Sequence[float] | None = None) -> None:
        self.sigmas = tuple(float(s) for s in sigmas)
        if len(self.sigmas) < 2:
            raise ValueError("a sampling run needs at least one step (two noise levels)")
        if any(b > a for a, b in zip(self.sigmas, self.sigmas[1:])):
            raise ValueError("the noise levels of this run rise, so steps cannot be told from them")
        top = self.sigmas[0] or 1.0
        self.times = tuple(float(t) for t in times) if times is not None else tuple(s / top for s in self.sigmas)
        if len(self.times) != len(self.sigmas):
            raise ValueError(f"{len(self.sigmas)} noise levels but {len(self.times)} times")
        gaps = [0.0] + [a - b for a, b in zip(self.sigmas, self.sigmas[1:])]
        self._thresholds = [-(s + _ON_SCHEDULE * gap) for s, gap in zip(self.sigmas[:-1], gaps)]

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    def step_of(self, sigma: float) -> int:
        """Index of the step an evaluation at `sigma` belongs to: the last one whose level is not below it.

        A level between two steps (dpm_2, SDE samplers) belongs to the earlier one; one above the first
        step's (churn) belongs to step 0.
        """
        return max(0, bisect_right(self._thresholds, -sigma) - 1)

    def time_of(self, sigma: float) -> float:
        """The model's time at `sigma`, interpolated between the steps' own and held beyond them."""
        if sigma >= self.sigmas[0]:
            return self.times[0]
        for (high, low), (t_high, t_low) in zip(zip(self.sigmas, self.sigmas[1:]), zip(self.times, self.times[1:]), strict=True):
            if sigma >= low and high > low:
                return t_low + (t_high - t_low) * (sigma - low) / (high - low)
        return self.times[-1]

    def window(self, start_sigma: float, end_sigma: float) -> range:
        """Steps whose level lies in start_sigma..end_sigma (start is the higher): where skipping is allowed."""
        inside = [i for i, s in enumerate(self.sigmas[:-1]) if end_sigma <= s <= start_sigma]
        return range(inside[0], inside[-1] + 1) if inside else range(0)

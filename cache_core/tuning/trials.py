"""Tries calibrated predictors out on prompts that they were not learned from, and keeps what came closest to the uncached latents.

Only the predictor is tried, on the plan that does best in general. Searched plans were tried as well and chosen where they stood two
standard errors above it, over 16 prompts: on 16 others they were level at 2.8x and 0.8 dB below at 5.6x, 1.3 below at 3.5x before halves
were kept apart. Two plans differ by 4 dB on a single prompt, either way; two predictors on one plan by less.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..calibration.calibration import Choice
from ..calibration.statistics import ForecastModel
from ..calibration.use import predictor_of
from ..kinds import Plan
from ..opening import Opening
from ..policies import FrontLoaded, Given
from ..run import CacheRun
from ..strategy import Strategy
from .tape import Sample

_SURE = 2.0  # standard errors (over the prompts) by which a trial must stand above the uncalibrated setting
_WORTH = 0.5  # dB that it must gain: 0.3 dB, two standard errors, were -0.05 on other prompts, and calibrated weights cost some SSIM


class _Trial(NamedTuple):
    """share: of calibrated weights, None for the uncalibrated predictor. distances: PSNR of every prompt, in dB."""

    share: float | None
    distances: list[float]

    @property
    def psnr(self) -> float:
        return statistics.fmean(self.distances)

    def is_surely_above(self, other: _Trial) -> bool:
        gains = [mine - theirs for mine, theirs in zip(self.distances, other.distances)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return statistics.fmean(gains) > max(_WORTH, _SURE * error)


class Trials:
    """halves: statistics of a part of the prompts each, prompt p belonging to part p mod their number; every prompt is sampled with
    what another part taught. steps: of a run. window: those that may be skipped.

    references: the uncached latent of every prompt. told: called after every sampling.
    """

    _SHARES: ClassVar[tuple[float, ...]] = (0.25, 0.5)  # more was never the best
    COUNT: ClassVar[int] = 1 + len(_SHARES)  # trials of one budget, each a sampling of all prompts

    def __init__(
        self,
        halves: Sequence[ForecastModel],
        steps: int,
        window: range,
        sample: Sample,
        references: Sequence[Tensor],
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._halves, self._steps, self._window = halves, steps, window
        self._sample, self._references, self._told = sample, references, told

    def choose(self, full: int) -> Choice:
        """The best predictor for `full` full evaluations; the uncalibrated one where none is surely better."""
        plan = FrontLoaded(self._steps / full).plan(self._steps, self._window)
        uncalibrated = best = self._try(plan, None)
        for share in self._SHARES:
            trial = self._try(plan, share)
            if trial.psnr > best.psnr and trial.is_surely_above(uncalibrated):
                best = trial
        return Choice(plan, best.share, best.psnr, uncalibrated.psnr)

    def _try(self, plan: Plan, share: float | None) -> _Trial:
        """Samples all prompts."""
        others = [*self._halves[1:], self._halves[0]]
        strategies = [Strategy(Given(plan), predictor_of(model, share), corrects=True) for model in others]
        distances = []
        for prompt, reference in enumerate(self._references):
            strategy = strategies[prompt % len(strategies)]

            def make(opening: Opening, strategy: Strategy = strategy) -> CacheRun:
                timeline, window = opening.timeline, opening.window
                return CacheRun(strategy, timeline, window, opening.family, opening.device, is_euler=opening.is_euler)

            distances.append(psnr(self._sample(prompt, make), reference))
            self._told()
        return _Trial(share, distances)


def psnr(latent: Tensor, reference: Tensor) -> float:
    """In dB, with the reference's range as the peak."""
    error = float((latent.float() - reference.float()).square().mean())
    peak = float(reference.max() - reference.min())
    return 10 * float(torch.log10(torch.tensor(max(peak, 1e-12) ** 2 / max(error, 1e-12))))

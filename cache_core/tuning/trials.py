"""Tries plans and predictors out on prompts that they were not learned from, and keeps what came closest to the uncached latents.

Two plans differ by 4 dB on a single prompt, either way, so what is kept stands surely above the setting that needs no calibration.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..calibration.calibration import Choice
from ..calibration.statistics import ForecastModel
from ..calibration.use import predictor_of, search_for
from ..kinds import Plan
from ..opening import Opening
from ..policies import FrontLoaded, Given
from ..run import CacheRun
from ..strategy import Strategy
from .tape import Sample

_SURE = 2.0  # standard errors (over the prompts) by which a trial must stand above the uncalibrated setting
_WORTH = 0.5  # dB that it must gain: 0.3 dB, two standard errors, were -0.05 on other prompts, and calibrated weights cost some SSIM


class _Trial(NamedTuple):
    """is_searched: whether the plan is the search's. share: of calibrated weights, None for the uncalibrated predictor.

    distances: PSNR of every prompt, in dB.
    """

    is_searched: bool
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
    what another part taught. whole: statistics of all prompts, which a plan that is kept is made of. opening: of a run to try in.

    references: the uncached latent of every prompt. told: called after every sampling.
    """

    SHARE: ClassVar[float] = 0.5  # of calibrated weights; a quarter and all of them were never better by more than 0.1 dB
    COUNT: ClassVar[int] = 4  # trials of one budget at most, each a sampling of all prompts

    def __init__(
        self,
        halves: Sequence[ForecastModel],
        whole: ForecastModel,
        opening: Opening,
        sample: Sample,
        references: Sequence[Tensor],
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._halves, self._whole, self._opening = halves, whole, opening
        self._sample, self._references, self._told = sample, references, told

    def choose(self, full: int) -> Choice:
        """The best plan and predictor for `full` full evaluations; those that need no calibration where none are surely better.

        Searched plans count on correcting, so they are for Euler samplers. Calibrated weights are tried on the plan that does best
        in general only where searched plans did no better than that.
        """
        steps = self._opening.timeline.steps
        general = FrontLoaded(steps / full).plan(steps, self._opening.window)
        uncalibrated = best = self._try([general] * len(self._halves), False, None)
        searched = [self._searched(half, general) for half in self._others()]
        if any(plan != general for plan in searched):
            for share in (None, self.SHARE):
                best = self._better(best, self._try(searched, True, share), uncalibrated)
        if best is uncalibrated:
            best = self._better(best, self._try([general] * len(self._halves), False, self.SHARE), uncalibrated)
        plan = self._searched(self._whole, general) if best.is_searched else general
        return Choice(plan, best.share, best.psnr, uncalibrated.psnr, best.is_searched)

    @staticmethod
    def _better(best: _Trial, trial: _Trial, uncalibrated: _Trial) -> _Trial:
        return trial if trial.psnr > best.psnr and trial.is_surely_above(uncalibrated) else best

    def _others(self) -> list[ForecastModel]:
        """What the prompts of each part are sampled with."""
        return [*self._halves[1:], self._halves[0]]

    def _searched(self, model: ForecastModel, start: Plan) -> Plan:
        times = self._opening.timeline.times[:-1]
        return search_for(model, times, self._opening.window, True).plan(start) if self._opening.is_euler else start

    def _try(self, plans: Sequence[Plan], is_searched: bool, share: float | None) -> _Trial:
        """Samples all prompts. plans: of every part."""
        strategies = [
            Strategy(Given(plan), predictor_of(model, share), corrects=True) for plan, model in zip(plans, self._others(), strict=True)
        ]
        distances = []
        for prompt, reference in enumerate(self._references):
            strategy = strategies[prompt % len(strategies)]

            def make(opening: Opening, strategy: Strategy = strategy) -> CacheRun:
                timeline, window = opening.timeline, opening.window
                return CacheRun(strategy, timeline, window, opening.family, opening.device, is_euler=opening.is_euler)

            distances.append(psnr(self._sample(prompt, make), reference))
            self._told()
        return _Trial(is_searched, share, distances)


def psnr(latent: Tensor, reference: Tensor) -> float:
    """In dB, with the reference's range as the peak."""
    error = float((latent.float() - reference.float()).square().mean())
    peak = float(reference.max() - reference.min())
    return 10 * float(torch.log10(torch.tensor(max(peak, 1e-12) ** 2 / max(error, 1e-12))))

"""Tries plans and predictors out on prompts that they were not learned from, and keeps what came closest to the uncached latents.

Two plans differ by 4 dB on a single prompt, either way, so what is kept stands surely above the setting that needs no calibration.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..calibration.calibration import STARTS, Choice
from ..calibration.statistics import ForecastModel
from ..calibration.use import predictor_of, search_for, start_plan
from ..kinds import Plan
from ..opening import Opening
from ..policies import Given
from ..run import CacheRun
from ..strategy import Strategy
from .tape import Sample

_SURE = 2.0  # standard errors (over the prompts) by which a trial must stand above the uncalibrated setting
_WORTH = 0.5  # dB that it must gain: 0.3 dB, two standard errors, were -0.05 on other prompts, and calibrated weights cost some SSIM


class _Trial(NamedTuple):
    """start: of the search for its plans, "" for the plan that does best in general. share: of calibrated weights, None for the
    uncalibrated predictor. distances: PSNR of every prompt, in dB.
    """

    start: str
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
    COUNT: ClassVar[int] = 2 + len(STARTS)  # trials of one budget at most, each a sampling of all prompts

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

        Searched plans count on correcting, so they are for Euler samplers. Calibrated weights are tried on the best plan alone.
        """
        steps, parts = self._opening.timeline.steps, self._others()
        general = start_plan("general", steps, self._opening.window, full)
        plans = {"": [general] * len(parts)}
        for start in STARTS if self._opening.is_euler else ():
            found = [self._searched(model, start, full) for model in parts]
            if found not in plans.values():
                plans[start] = found
        trials = [self._try(found, start, None) for start, found in plans.items()]
        uncalibrated, best = trials[0], max(trials, key=lambda trial: trial.psnr)
        trials.append(self._try(plans[best.start], best.start, self.SHARE))
        sure = [uncalibrated, *(trial for trial in trials if trial.is_surely_above(uncalibrated))]
        chosen = max(sure, key=lambda trial: trial.psnr)
        plan = self._searched(self._whole, chosen.start, full) if chosen.start else general
        return Choice(plan, chosen.share, chosen.psnr, uncalibrated.psnr, chosen.start)

    def _others(self) -> list[ForecastModel]:
        """What the prompts of each part are sampled with."""
        return [*self._halves[1:], self._halves[0]]

    def _searched(self, model: ForecastModel, start: str, full: int) -> Plan:
        timeline, window = self._opening.timeline, self._opening.window
        search = search_for(model, timeline.times[:-1], window, is_corrected=True)
        return search.plan(start_plan(start, timeline.steps, window, full))

    def _try(self, plans: Sequence[Plan], start: str, share: float | None) -> _Trial:
        """Samples all prompts. plans: of every part."""
        strategies = [
            Strategy(Given(plan), predictor_of(model, share), corrects=True) for plan, model in zip(plans, self._others(), strict=True)
        ]
        distances = []
        for prompt, reference in enumerate(self._references):
            strategy = strategies[prompt % len(strategies)]

            def make(opening: Opening, strategy: Strategy = strategy) -> CacheRun:
                return CacheRun(
                    strategy,
                    opening.timeline,
                    opening.window,
                    opening.family,
                    opening.device,
                    is_euler=opening.is_euler,
                    unrecorded=opening.unrecorded,
                    places=opening.places,
                )

            distances.append(psnr(self._sample(prompt, make), reference))
            self._told()
        return _Trial(start, share, distances)


def psnr(latent: Tensor, reference: Tensor) -> float:
    """In dB, with the reference's range as the peak."""
    error = float((latent.float() - reference.float()).square().mean())
    peak = float(reference.max() - reference.min())
    return 10 * float(torch.log10(torch.tensor(max(peak, 1e-12) ** 2 / max(error, 1e-12))))

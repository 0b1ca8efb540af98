"""Tries plans and predictors out on prompts that they were not learned from, and keeps what came closest to the uncached latents.

Two plans differ by 4 dB on a single prompt, either way, so what is kept stands surely above the setting that needs no calibration.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from ..calibration.calibration import ORIGINS, TriedPlan
from ..calibration.statistics import ForecastModel
from ..calibration.use import origin_plan, predictor_of, search_for
from ..planning.plan import Plan
from ..planning.policies import Given
from ..run import CacheRun
from ..run_start import RunStart
from ..strategy import Strategy
from .tape import Sample

_SURE = 2.0  # standard errors (over the prompts) by which a trial must stand above the uncalibrated setting
_WORTH = 0.5  # dB that it must gain: 0.3 dB, two standard errors, were -0.05 on other prompts, and calibrated weights cost some SSIM


class _Trial(NamedTuple):
    """origin: of the search for its plans, "" for the plan that does best in general. share: of calibrated weights, None for the
    uncalibrated predictor. distances: PSNR of every prompt, in dB.
    """

    origin: str
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
    what another part taught. pooled: statistics of all prompts, which a plan that is kept is made of. start: of a run to try in.

    references: the uncached latent of every prompt. told: called after every sampling.
    """

    SHARE: ClassVar[float] = 0.5  # of calibrated weights; a quarter and all of them were never better by more than 0.1 dB
    COUNT: ClassVar[int] = 2 + len(ORIGINS)  # trials of one budget at most, each a sampling of all prompts

    def __init__(
        self,
        halves: Sequence[ForecastModel],
        pooled: ForecastModel,
        start: RunStart,
        sample: Sample,
        references: Sequence[Tensor],
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._halves, self._pooled, self._start = halves, pooled, start
        self._sample, self._references, self._told = sample, references, told

    def best(self, budget: int) -> TriedPlan:
        """The best plan and predictor for `budget` full evaluations; those that need no calibration where none are surely better.

        Searched plans count on correcting, so they are for Euler samplers. Calibrated weights are tried on the best plan alone.
        """
        steps, parts = self._start.timeline.steps, self._others()
        general = origin_plan("general", steps, self._start.window, budget)
        plans = {"": [general] * len(parts)}
        for origin in ORIGINS if self._start.is_euler else ():
            found = [self._searched(model, origin, budget) for model in parts]
            if found not in plans.values():
                plans[origin] = found
        trials = [self._try(found, origin, None) for origin, found in plans.items()]
        uncalibrated, best = trials[0], max(trials, key=lambda trial: trial.psnr)
        trials.append(self._try(plans[best.origin], best.origin, self.SHARE))
        sure = [uncalibrated, *(trial for trial in trials if trial.is_surely_above(uncalibrated))]
        winner = max(sure, key=lambda trial: trial.psnr)
        plan = self._searched(self._pooled, winner.origin, budget) if winner.origin else general
        return TriedPlan(plan, winner.share, winner.psnr, uncalibrated.psnr, winner.origin)

    def _others(self) -> list[ForecastModel]:
        """What the prompts of each part are sampled with."""
        return [*self._halves[1:], self._halves[0]]

    def _searched(self, model: ForecastModel, origin: str, budget: int) -> Plan:
        timeline, window = self._start.timeline, self._start.window
        search = search_for(model, timeline.times[:-1], window, is_corrected=True)
        return search.plan(origin_plan(origin, timeline.steps, window, budget))

    def _try(self, plans: Sequence[Plan], origin: str, share: float | None) -> _Trial:
        """Samples all prompts. plans: of every part."""
        strategies = [
            Strategy(Given(plan), predictor_of(model, share), corrects=True) for plan, model in zip(plans, self._others(), strict=True)
        ]
        distances = []
        for prompt, reference in enumerate(self._references):
            strategy = strategies[prompt % len(strategies)]

            def make(start: RunStart, strategy: Strategy = strategy) -> CacheRun:
                return CacheRun(strategy, start)

            distances.append(psnr(self._sample(prompt, make), reference))
            self._told()
        return _Trial(origin, share, distances)


def psnr(latent: Tensor, reference: Tensor) -> float:
    """In dB, with the reference's range as the peak."""
    error = float((latent.float() - reference.float()).square().mean())
    peak = float(reference.max() - reference.min())
    return 10 * float(torch.log10(torch.tensor(max(peak, 1e-12) ** 2 / max(error, 1e-12))))

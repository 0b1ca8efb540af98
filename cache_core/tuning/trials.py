"""Tries plans and predictors out on prompts that they were not learned from, and keeps those that come closest to the uncached latents.

On a single prompt two plans may differ by 4 dB in either direction. So a result is kept only where its gain over the uncalibrated setting
is statistically sure.
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

_SURE = 2.0  # standard errors over the prompts that the gain over the uncalibrated setting must exceed
_WORTH = 0.5  # dB that the gain must exceed: 0.3 dB, two standard errors, became -0.05 on other prompts; calibrated weights cost some SSIM


class _Trial(NamedTuple):
    """The result of sampling all prompts with one kind of plan and one predictor.

    Args:
        origin: Where the search for the plans began, one of `ORIGINS`. "" is the front-loaded plan without a search.
        share: Share 0..1 of calibrated weights. None is the uncalibrated predictor.
        distances: PSNR of every prompt against its uncached latent, in dB.
    """

    origin: str
    share: float | None
    distances: list[float]

    @property
    def psnr(self) -> float:
        """The mean PSNR over the prompts, in dB."""
        return statistics.fmean(self.distances)

    def is_surely_above(self, other: _Trial) -> bool:
        """Returns whether the mean gain over `other` exceeds both `_WORTH` and `_SURE` standard errors."""
        gains = [mine - theirs for mine, theirs in zip(self.distances, other.distances)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return statistics.fmean(gains) > max(_WORTH, _SURE * error)


class Trials:
    """Tries plans and predictors out for one model. Every prompt is sampled with what another part of the prompts taught.

    Args:
        halves: Statistics of each part of the prompts. Prompt p belongs to part p modulo their number.
        pooled: Statistics of all prompts, from which a plan that is kept is searched again.
        start: A run of the calibrated model.
        sample: Samples a prompt.
        references: Uncached latent of every prompt.
        on_progress: Called after every sampling.

    Attributes:
        SHARE: Share of calibrated weights that is tried. A quarter and all of them were never better by more than 0.1 dB.
        COUNT: Largest number of trials for one budget. Each samples all prompts.
    """

    SHARE: ClassVar[float] = 0.5
    COUNT: ClassVar[int] = 2 + len(ORIGINS)

    def __init__(
        self,
        halves: Sequence[ForecastModel],
        pooled: ForecastModel,
        start: RunStart,
        sample: Sample,
        references: Sequence[Tensor],
        on_progress: Callable[[], None] = lambda: None,
    ) -> None:
        self._halves, self._pooled, self._start = halves, pooled, start
        self._sample, self._references, self._on_progress = sample, references, on_progress

    def best(self, budget: int) -> TriedPlan:
        """Returns the best plan and predictor for `budget` full evaluations: the uncalibrated ones unless others are surely better.

        Searched plans rely on the `Corrector`, so only Euler samplers get them. Calibrated weights are tried on the best plan only.
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
        """Returns the statistics that each part of the prompts is sampled with: those of the next part; its own if there is only one."""
        return [*self._halves[1:], self._halves[0]]

    def _searched(self, model: ForecastModel, origin: str, budget: int) -> Plan:
        """Returns the best plan found from an origin with these statistics."""
        timeline, window = self._start.timeline, self._start.window
        search = search_for(model, timeline.times[:-1], window, is_corrected=True)
        return search.plan(origin_plan(origin, timeline.steps, window, budget))

    def _try(self, plans: Sequence[Plan], origin: str, share: float | None) -> _Trial:
        """Samples all prompts with the plans of their parts and a share of calibrated weights."""
        strategies = [
            Strategy(Given(plan), predictor_of(model, share), corrects=True) for plan, model in zip(plans, self._others(), strict=True)
        ]
        distances = []
        for prompt, reference in enumerate(self._references):
            strategy = strategies[prompt % len(strategies)]

            def make(start: RunStart, strategy: Strategy = strategy) -> CacheRun:
                return CacheRun(strategy, start)

            distances.append(psnr(self._sample(prompt, make), reference))
            self._on_progress()
        return _Trial(origin, share, distances)


def psnr(latent: Tensor, reference: Tensor) -> float:
    """Returns the PSNR in dB, with the range of the reference as the peak."""
    error = float((latent.float() - reference.float()).square().mean())
    peak = float(reference.max() - reference.min())
    return 10 * float(torch.log10(torch.tensor(max(peak, 1e-12) ** 2 / max(error, 1e-12))))

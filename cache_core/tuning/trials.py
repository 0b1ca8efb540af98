"""Tries predictors and plans out on prompts that they were not learned from, and keeps what came closest to the uncached latents."""

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
from ..policies import Given, usual_gaps
from ..run import CacheRun
from ..strategy import Strategy
from .tape import Sample

# How many standard errors (over the prompts) a trial must stand above the uncalibrated setting. Two plans differ by about 4 dB on a
# single prompt, either way, and the best of some trials on few prompts is no better on others.
_SURE = 2.0


class _Candidate(NamedTuple):
    """share: of calibrated weights in the predictor, None for the uncalibrated one. is_searched: the plan, for that predictor."""

    share: float | None
    is_searched: bool


_UNCALIBRATED = _Candidate(None, False)


class _Trial(NamedTuple):
    """distances: PSNR of every prompt, in dB."""

    candidate: _Candidate
    distances: list[float]

    @property
    def psnr(self) -> float:
        return statistics.fmean(self.distances)

    def is_surely_above(self, other: _Trial) -> bool:
        gains = [mine - theirs for mine, theirs in zip(self.distances, other.distances)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return statistics.fmean(gains) > _SURE * error


class Trials:
    """model: statistics with sensitivities, of all prompts. halves: the same of a part each, prompt p belonging to part p mod their
    number; every prompt is sampled with what another part taught. times: of the run's steps. window: steps that may be skipped.

    references: the uncached latent of every prompt. told: called after every sampling.
    """

    _CANDIDATES: ClassVar[tuple[_Candidate, ...]] = (
        _Candidate(0.5, False),
        _Candidate(1.0, False),
        _Candidate(None, True),
        _Candidate(0.5, True),
        _Candidate(1.0, True),
    )
    COUNT: ClassVar[int] = 1 + len(_CANDIDATES)  # trials of one budget, each a sampling of all prompts

    def __init__(
        self,
        model: ForecastModel,
        halves: Sequence[ForecastModel],
        times: Sequence[float],
        window: range,
        sample: Sample,
        references: Sequence[Tensor],
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._halves, self._times, self._window = model, halves, times, window
        self._sample, self._references, self._told = sample, references, told

    def choose(self, full: int) -> Choice:
        """The best candidate for `full` full evaluations; the uncalibrated setting where none is surely better."""
        uncalibrated = best = self._try(_UNCALIBRATED, full)
        for candidate in self._CANDIDATES:
            trial = self._try(candidate, full)
            if trial.psnr > best.psnr and trial.is_surely_above(uncalibrated):
                best = trial
        plan = self._plan(self._model, best.candidate, full)
        return Choice(plan, best.candidate.share, best.psnr, uncalibrated.psnr)

    def _plan(self, model: ForecastModel, candidate: _Candidate, full: int) -> Plan:
        if candidate.is_searched:
            return search_for(model, candidate.share, self._times, self._window).plan(full)
        steps = len(self._times)
        return usual_gaps(steps, steps / full).plan(steps, self._window)

    def _try(self, candidate: _Candidate, full: int) -> _Trial:
        """Samples all prompts."""
        others = [*self._halves[1:], self._halves[0]]
        strategies = [Strategy(Given(self._plan(m, candidate, full)), predictor_of(m, candidate.share)) for m in others]
        distances = []
        for prompt, reference in enumerate(self._references):
            strategy = strategies[prompt % len(strategies)]

            def make(opening: Opening, strategy: Strategy = strategy) -> CacheRun:
                return CacheRun(strategy, opening.timeline, opening.window, opening.family, opening.device)

            distances.append(psnr(self._sample(prompt, make), reference))
            self._told()
        return _Trial(candidate, distances)


def psnr(latent: Tensor, reference: Tensor) -> float:
    """In dB, with the reference's range as the peak."""
    error = float((latent.float() - reference.float()).square().mean())
    peak = float(reference.max() - reference.min())
    return 10 * float(torch.log10(torch.tensor(max(peak, 1e-12) ** 2 / max(error, 1e-12))))

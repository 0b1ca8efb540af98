"""Tries plans and predictors out on the calibration prompts and keeps, for every budget, what came closest to the uncached latents."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration.calibration import Choice
from ..calibration.statistics import ForecastModel
from ..calibration.use import predictor_of, search_for
from ..kinds import Kind, Plan
from ..opening import Opening
from ..policies import Given, GrowingGaps
from ..run import CacheRun
from ..strategy import Strategy
from .tape import Sample

# Predictor and plan, by share of calibrated weights (None: the uncalibrated predictor). The plan is searched for the second share,
# or the uncalibrated one where there is none. Of all nine pairs these came first somewhere, on 24 prompts at four speeds.
_CANDIDATES: tuple[tuple[float | None, tuple[float | None] | None], ...] = (
    (0.5, None),
    (None, (None,)),
    (0.5, (0.5,)),
    (0.5, (1.0,)),
    (1.0, (1.0,)),
)
# How many standard errors (over the prompts) a trial must stand above another. Two plans differ by about 4 dB on a single prompt,
# either way, and the best of some trials on few prompts is no better on others: without this, eight prompts gave +2.4 dB on
# themselves and -1.9 on sixteen others; with one standard error, sixteen gave +1.6 and -1.2 (3.5x).
_SURE = 2.0


class _Trial(NamedTuple):
    """distances: PSNR of every prompt, in dB."""

    plan: Plan
    share: float | None
    distances: list[float]

    @property
    def psnr(self) -> float:
        return statistics.fmean(self.distances)

    def is_above(self, other: _Trial, sure: float) -> bool:
        """Whether the mean gain over `other` is more than `sure` standard errors."""
        gains = [mine - theirs for mine, theirs in zip(self.distances, other.distances)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return statistics.fmean(gains) > sure * error


class Trials:
    """model: statistics with sensitivities. times: of the run's steps. window: steps that may be skipped.

    references: the uncached latent of every prompt. told: called after every sampling.
    """

    def __init__(
        self,
        model: ForecastModel,
        times: Sequence[float],
        window: range,
        sample: Sample,
        references: Sequence[Tensor],
        told: Callable[[], None] = lambda: None,
    ) -> None:
        self._model, self._times, self._window = model, times, window
        self._sample, self._references, self._told = sample, references, told
        self._searches = {share: search_for(model, share, times, window) for share in (None, 0.5, 1.0)}

    @staticmethod
    def count(tries: int) -> int:
        """Trials of one budget at most, each a sampling of all prompts."""
        return 1 + len(_CANDIDATES) + tries

    def choose(self, full: int, tries: int) -> Choice:
        """The best of `full` full evaluations: first of a few candidates, then by moving its full evaluations while that helps.

        tries: at most this many moves are tried. The uncalibrated setting stays where nothing is surely better.
        """
        uncalibrated = best = self._try(GrowingGaps(len(self._times) / full).plan(len(self._times), self._window), None)
        tried: set[tuple[str, float | None]] = {(str(best.plan), None)}
        for share, searched in _CANDIDATES:
            plan = uncalibrated.plan if searched is None else self._searches[searched[0]].plan(full)
            if (str(plan), share) in tried:
                continue
            tried.add((str(plan), share))
            trial = self._try(plan, share)
            if trial.psnr > best.psnr and trial.is_above(uncalibrated, _SURE):
                best = trial
        best = self._climbed(best, tries)
        return Choice(best.plan, best.share, best.psnr, uncalibrated.psnr)

    def _climbed(self, best: _Trial, tries: int) -> _Trial:
        tried = {str(best.plan)}
        while True:
            for plan in [plan for plan in self._moves(best) if str(plan) not in tried]:
                if tries <= 0:
                    return best
                tries -= 1
                tried.add(str(plan))
                trial = self._try(plan, best.share)
                if trial.is_above(best, _SURE):
                    best = trial
                    break
            else:
                return best

    def _moves(self, trial: _Trial) -> list[Plan]:
        """Plans with one full evaluation a step earlier or later, the most promising first."""
        full = {step for step in range(len(trial.plan)) if trial.plan[step] is Kind.FULL}
        free = [step for step in self._window if step > 0]
        moved = [full - {step} | {step + by} for step in free for by in (-1, 1) if step in full and step + by in set(free) - full]
        search = self._searches[trial.share]
        return [search.plan(len(full), start=chosen) for chosen in sorted(moved, key=search.cost)]

    def _try(self, plan: Plan, share: float | None) -> _Trial:
        """Samples all prompts."""
        strategy = Strategy(Given(plan), predictor_of(self._model, share))

        def make(opening: Opening) -> CacheRun:
            return CacheRun(strategy, opening.timeline, opening.window, opening.family, opening.device)

        distances = []
        for prompt, reference in enumerate(self._references):
            distances.append(psnr(self._sample(prompt, make), reference))
            self._told()
        return _Trial(plan, share, distances)


def psnr(latent: Tensor, reference: Tensor) -> float:
    """In dB, with the reference's range as the peak."""
    error = float((latent.float() - reference.float()).square().mean())
    peak = float(reference.max() - reference.min())
    return 10 * float(torch.log10(torch.tensor(max(peak, 1e-12) ** 2 / max(error, 1e-12))))

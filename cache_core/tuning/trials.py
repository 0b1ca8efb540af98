"""Tries plans and predictors out on the calibration prompts and keeps, for every budget, what came closest to the uncached latents."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..calibration.calibration import Choice
from ..calibration.search import PlanSearch
from ..calibration.statistics import ForecastModel
from ..calibration.use import predictor_of, search_for
from ..kinds import Kind, Plan
from ..opening import Opening
from ..policies import Given, GrowingGaps
from ..strategy import Strategy
from .tape import Sample, Tape, TapedRun

SHARES: tuple[float | None, ...] = (None, 0.5, 1.0)  # of calibrated weights; None is the uncalibrated predictor
# how many standard errors (over the prompts) a trial must stand above another: samplings differ by dBs, and the best of many
# trials on few prompts is no better on others (without this, eight prompts gave +2.4 dB on themselves and -1.9 on sixteen others)
_SURE_OF_CANDIDATE, _SURE_OF_MOVE = 1.0, 2.0


class _Trial(NamedTuple):
    """distances: PSNR of every prompt, in dB. tapes: one per prompt."""

    plan: Plan
    share: float | None
    distances: list[float]
    tapes: list[Tape]

    @property
    def psnr(self) -> float:
        return statistics.fmean(self.distances)

    def is_above(self, other: _Trial, sure: float) -> bool:
        """Whether the mean gain over `other` is more than `sure` standard errors."""
        gains = [mine - theirs for mine, theirs in zip(self.distances, other.distances)]
        error = statistics.stdev(gains) / len(gains) ** 0.5 if len(gains) > 1 else 0.0
        return statistics.fmean(gains) > sure * error


@dataclass
class Trials:
    """model: statistics with sensitivities. times: of the run's steps. window: steps that may be skipped.

    references: the uncached latent of every prompt. told: called after every sampling.
    """

    model: ForecastModel
    times: Sequence[float]
    window: range
    sample: Sample
    references: Sequence[Tensor]
    told: Callable[[], None] = lambda: None

    def choose(self, full: int, tries: int) -> Choice:
        """The best of `full` full evaluations: first of a few candidates, then by moving its full evaluations while that helps.

        tries: at most this many moves are tried. The uncalibrated setting stays where nothing is surely better.
        """
        uncalibrated = self._try(GrowingGaps(len(self.times) / full).plan(len(self.times), self.window), None)
        best = uncalibrated
        tried: set[tuple[str, float | None]] = {(str(best.plan), None)}
        for share in SHARES:
            for plan in (self._searched(share).plan(full), uncalibrated.plan):
                if (str(plan), share) not in tried:
                    tried.add((str(plan), share))
                    trial = self._try(plan, share)
                    if trial.psnr > best.psnr and trial.is_above(uncalibrated, _SURE_OF_CANDIDATE):
                        best = trial
        best = self._climbed(best, tries)
        return Choice(best.plan, best.share, best.psnr, uncalibrated.psnr)

    def _climbed(self, best: _Trial, tries: int) -> _Trial:
        tried = {str(best.plan)}
        while True:
            moves = [plan for plan in self._moves(best) if str(plan) not in tried]
            for plan in moves:
                if tries <= 0:
                    return best
                tries -= 1
                tried.add(str(plan))
                trial = self._try(plan, best.share, best)
                if trial.is_above(best, _SURE_OF_MOVE):
                    best = trial
                    break
            else:
                return best

    def _moves(self, trial: _Trial) -> list[Plan]:
        """Plans with one full evaluation a step earlier or later, the most promising first."""
        full = [step for step in range(len(trial.plan)) if trial.plan[step] is Kind.FULL]
        search = self._searched(trial.share)
        moved = [
            {*full, step + by} - {step}
            for step in full
            for by in (-1, 1)
            if step in self.window and step + by in self.window and step > 0 and step + by > 0 and step + by not in full
        ]
        return [search.plan(len(full), start=chosen) for chosen in sorted(moved, key=search.cost)]

    def _try(self, plan: Plan, share: float | None, like: _Trial | None = None) -> _Trial:
        """Samples all prompts; as far as the plan is that of `like`, its tapes are played back."""
        same = next((i for i in range(len(plan)) if like is None or plan[i] is not like.plan[i]), len(plan))
        strategy = Strategy(Given(plan), predictor_of(self.model, share))
        distances, tapes = [], []
        for prompt, reference in enumerate(self.references):
            before = like.tapes[prompt] if like is not None else None
            # steps and evaluations are not the same: samplers may evaluate several times a step
            until = before.before(self.times[same]) if before is not None and same < len(plan) else 0
            runs: list[TapedRun] = []

            def make(opening: Opening, before: Tape | None = before, until: int = until, runs: list[TapedRun] = runs) -> TapedRun:
                runs.append(TapedRun(strategy, opening, before, until))
                return runs[-1]

            distances.append(psnr(self.sample(prompt, make), reference))
            tapes.append(runs[-1].tape)
            self.told()
        return _Trial(plan, share, distances, tapes)

    def _searched(self, share: float | None) -> PlanSearch:
        return search_for(self.model, share, self.times, self.window)


def psnr(latent: Tensor, reference: Tensor) -> float:
    """In dB, with the reference's range as the peak."""
    error = float((latent.float() - reference.float()).square().mean())
    peak = float(reference.max() - reference.min())
    return 10 * float(torch.log10(torch.tensor(max(peak, 1e-12) ** 2 / max(error, 1e-12))))

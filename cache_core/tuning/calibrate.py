"""Calibrates a model from start to end: records runs, measures how errors change the picture, tries plans out, factorises layers."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..calibration.calibration import Factors, Forecast
from ..calibration.low_rank import Magnitudes, factorise_sites, measuring
from ..calibration.statistics import ForecastModel, Moments, stretches
from ..calibration.use import error_of
from ..engine.linear_sites import LinearSite
from ..model_call import ModelCall
from ..planning.kinds import Kind
from ..planning.plan import Plan
from ..planning.policies import AlwaysCompute, Given
from ..predictors import AUTO, Predictor, Reuse
from ..run_start import RunStart
from ..strategy import Strategy
from .tape import Sample, Tape, TapedRun
from .trials import Trials

_NODES = 32  # largest number of evaluations with statistics: memory grows with its square, and statistics vary slowly
_TOKENS = 1024  # tokens of every cond that are used, chosen at random
_SENSITIVITY_PROMPTS = 8  # prompts that sensitivities are measured on; four can mislead a search by 2 dB, eight hardly
_SENSITIVITY_STRIDE = 3  # steps from one measured step to the next
_SEED = 0


@dataclass(frozen=True)
class Wishes:
    """What a calibration is asked for.

    Args:
        forecast: Whether to record runs, measure sensitivities and try plans out.
        method: Method of the low-rank factors, one of `low_rank.METHODS`. "" makes none.
        rank: Rank of the low-rank factors.
        speedups: Speedups that plans are tried out for: steps per full evaluation.
        directions: Number of directions of hidden channels that are kept for the correction.
    """

    forecast: bool = True
    method: str = ""
    rank: int = 64
    speedups: tuple[float, ...] = (1.4, 2.0, 2.8, 3.5, 4.7, 5.6)
    directions: int = 128


class Learned(NamedTuple):
    """The result of a calibration.

    Args:
        times: The model's time at the recorded evaluations.
        steps: Sampler steps of a run.
        forecast: Statistics and the plans that did best. None if they were not asked for.
        factors: Low-rank factors. None if they were not asked for.
    """

    times: tuple[float, ...]
    steps: int
    forecast: Forecast | None
    factors: Factors | None


@dataclass(frozen=True)
class _Listening(Predictor):
    """Makes the engine keep inputs with the hidden states. It fills nothing."""

    history: int = 1
    uses_input: ClassVar[bool] = True


class Calibrator:
    """Calibrates one model.

    Prompts are taken in two halves, each with its own statistics, and what is learned from one half is tried out on the other. The result
    is made from the statistics of both.

    Memory besides the model's, while recording. On its device, between evaluations: one hidden state and one input of each cond. During a
    call, two more tensors of a hidden state's size: the embedded input, and the hidden state minus it. In the first evaluation of a run,
    one more for the proof. In system memory, twice n²·d·C floats of statistics (0.6 GiB each for FLUX at 28 evaluations), with n recorded
    evaluations and d and C the channels of an input and of a hidden token, and the hidden states of one run of one prompt (24 MiB each for
    FLUX at 1024×1024: 1.3 GiB with 28 evaluations of two conds).

    Args:
        sample: Samples a prompt.
        prompts: Number of prompts.
        wishes: What is asked for.
        on_progress: Called with the name of the stage, the number of its samplings (or layers) that are done, and their total number.
    """

    def __init__(
        self,
        sample: Sample,
        prompts: int,
        wishes: Wishes,
        on_progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
    ) -> None:
        self._sample, self._prompts = sample, prompts
        self._wishes, self._on_progress = wishes, on_progress
        self._halves = [Moments() for _ in range(min(2, prompts))]  # statistics of the even prompts and of the odd ones
        self._sites: list[LinearSite] = []
        self._magnitudes = Magnitudes(increments=wishes.method == "cd_svd") if wishes.method else None
        self._references: list[Tensor] = []
        self._times: tuple[float, ...] = ()
        self._start: RunStart | None = None
        self._dtype = torch.float32  # dtype that the blocks compute in

    def run(self) -> Learned:
        """Runs all stages and returns what was learned.

        Raises:
            ValueError: If the model's calls cannot be recorded or its layers cannot be factorised, with a message for the user.
        """
        self._record()
        assert self._start is not None, "recording has opened runs"
        forecast = self._forecast(self._start) if self._wishes.forecast else None
        factors = self._factors(self._start) if self._wishes.method else None
        return Learned(self._times, self._start.timeline.steps, forecast, factors)

    # -- stages -----------------------------------------------------------------------------------------

    def _record(self) -> None:
        """Samples all prompts in full, and adds up their statistics and magnitudes."""

        def listen(call: ModelCall, sites: list[LinearSite]) -> AbstractContextManager[None]:
            self._sites = sites
            return measuring(call.conds, sites, self._magnitudes) if self._magnitudes is not None else nullcontext()

        for prompt in range(self._prompts):
            self._on_progress("recording", prompt, self._prompts)
            if self._magnitudes is not None:
                self._magnitudes.begin_run()
            latent, tape = self._taped(prompt, self._full(), listen=listen if self._wishes.method else None)
            self._references.append(latent)
            self._dtype = tape.dtype or self._dtype
            if self._wishes.forecast:
                self._add(tape, self._halves[prompt % len(self._halves)])

    def _full(self) -> Strategy:
        """Returns the strategy of the recorded runs."""
        return Strategy(AlwaysCompute(), _Listening() if self._wishes.forecast else Reuse(), name="recording")

    def _add(self, tape: Tape, moments: Moments) -> None:
        """Adds the trajectories of one recorded run to the statistics."""
        trajectories = tape.trajectories()
        if not trajectories:
            raise ValueError(
                "the model's evaluations could not be recorded: another node replaces the model in some steps, or conditionings are active "
                "in some steps only. Remove such nodes for calibrating"
            )
        if any(later > time for time, later in pairwise(tape.times)):
            raise ValueError("this sampler goes back to higher noise levels, which cannot be calibrated: choose another")
        # of several evaluations at one noise level only the last, which a cached run keeps, too
        apart = [i for i, time in enumerate(tape.times) if time not in tape.times[i + 1 :]]
        nodes = sorted({apart[round(i)] for i in np.linspace(0, len(apart) - 1, min(_NODES, len(apart)))})
        times = tuple(tape.times[node] for node in nodes)
        if self._times and times != self._times:
            raise ValueError("the prompts were sampled at different noise levels: use the same scheduler and steps for all of them")
        self._times = times
        generator = torch.Generator().manual_seed(_SEED)
        for u, z in trajectories:
            rows = torch.randperm(u.shape[1], generator=generator)[:_TOKENS]
            moments.add(u[nodes][:, rows], z[nodes][:, rows])

    def _forecast(self, start: RunStart) -> Forecast:
        """Measures sensitivities, tries plans out and returns the statistics of all prompts with the plans that did best."""
        halves = [self._measured(half, start) for half in range(len(self._halves))]
        sensitivities = torch.stack([half.sensitivity for half in halves if half.sensitivity is not None])
        moments = self._halves[0]
        for other in self._halves[1:]:
            moments.absorb(other)
        model = replace(moments.compress(self._times, self._wishes.directions), sensitivity=sensitivities.log().mean(0).exp())
        step_times = start.timeline.times[:-1]
        budgets = _budgets(len(step_times), self._wishes.speedups)
        done = 0

        def on_progress() -> None:
            nonlocal done
            done += 1
            self._on_progress("trying out", done, total)

        total = len(budgets) * self._prompts * Trials.COUNT
        trials = Trials(halves, model, start, self._sample, self._references, on_progress)
        tried = tuple(trials.best(budget) for budget in budgets)
        if not tried:
            raise ValueError(f"{len(step_times)} steps are too few to skip any: calibrate with more steps")
        return Forecast(model, step_times, tried)

    def _measured(self, half: int, start: RunStart) -> ForecastModel:
        """Returns the statistics of one half of the prompts, with sensitivities.

        The sensitivity of a step is s_i = mean ‖x_final − x_final,full‖² / e_i, from a run in which only step i is forecast (uncalibrated),
        with e_i the expected square error of that forecast. It is measured at every third step and at the last one, as the geometric mean
        over prompts, because single prompts are far more sensitive than others. Between these steps it is interpolated on a log scale,
        divided by the square of the time that a step stands for, because recorded evaluations may be further apart than steps.

        Args:
            half: Number of the half, 0 or 1.
            start: A run of the calibrated model.
        """
        model = self._halves[half].compress(self._times, self._wishes.directions)
        times, steps = start.timeline.times[:-1], start.timeline.steps
        measured = sorted({*range(1, steps, _SENSITIVITY_STRIDE), steps - 1} & set(start.window) - {0})
        if not measured:
            return replace(model, sensitivity=torch.ones(len(model.times), dtype=torch.float64))
        halves = len(self._halves)
        prompts = range(half, self._prompts, halves)[: _SENSITIVITY_PROMPTS // halves]
        total = halves * len(prompts) * len(measured)
        logs = np.zeros(len(measured))
        for number, prompt in enumerate(prompts):
            _, tape = self._taped(prompt, Strategy(AlwaysCompute(), AUTO))  # sampled again, so that only one tape is kept at a time
            for index, step in enumerate(measured):
                done = (half * len(prompts) + number) * len(measured) + index
                self._on_progress("measuring sensitivity", min(done, total), total)
                plan = Plan(tuple(Kind.SKIPPED if other == step else Kind.FULL for other in range(steps)))
                strategy = Strategy(Given(plan), AUTO, name="sensitivity")
                latent, _ = self._taped(prompt, strategy, tape, tape.before(times[step]))
                square = float((latent.float() - self._references[prompt].float()).square().mean())
                logs[index] += np.log(max(square, 1e-30)) / len(prompts)
        error = error_of(model, None)
        errors = [error(times[:step][-AUTO.history :], times[step]) for step in measured]
        logs -= np.log(np.maximum(errors, 1e-30)) + 2 * np.log(np.asarray(stretches(times))[measured])
        over_time = np.interp(model.times, [times[step] for step in reversed(measured)], logs[::-1])
        return replace(model, sensitivity=torch.from_numpy(np.exp(over_time) * np.square(stretches(model.times))))

    def _factors(self, start: RunStart) -> Factors:
        """Factorises all linear layers."""
        tensors, energy = factorise_sites(
            self._sites,
            self._wishes.rank,
            self._wishes.method,
            self._magnitudes,
            torch.bfloat16 if self._dtype is torch.bfloat16 else torch.float16,
            start.device,
            lambda done, total: self._on_progress("factorising layers", done, total),
            call_dtype=self._dtype,
        )
        return Factors(tensors, energy)

    # -- sampling ---------------------------------------------------------------------------------------

    def _taped(
        self,
        prompt: int,
        strategy: Strategy,
        before: Tape | None = None,
        until: int = 0,
        listen: Callable[[ModelCall, list[LinearSite]], AbstractContextManager[None]] | None = None,
    ) -> tuple[Tensor, Tape]:
        """Samples a prompt and returns the final latent with the tape of the run. For the arguments see `TapedRun`."""
        runs: list[TapedRun] = []

        def make(start: RunStart) -> TapedRun:
            self._start = start
            runs.append(TapedRun(strategy, start, before, until, listen))
            return runs[-1]

        latent = self._sample(prompt, make)
        return latent, runs[-1].tape


def _budgets(steps: int, speedups: Sequence[float]) -> list[int]:
    """Returns the numbers of full evaluations for the speedups, most first, without the number that is all steps."""
    return sorted({min(steps, max(2, round(steps / speedup))) for speedup in speedups} - {steps}, reverse=True)

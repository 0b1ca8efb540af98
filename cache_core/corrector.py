"""Corrects, from a full evaluation on, the error that the skipped evaluations before it left in the latent."""

from __future__ import annotations

from torch import Tensor

from .meter import Evaluation
from .planning.kinds import Kind
from .planning.plan import Plan
from .planning.timeline import Timeline


class Corrector:
    """Corrects the denoised latents of an Euler sampler after a gap of skipped steps.

    It is the corrector to the forecasts of a `Predictor`, as in predictor-corrector methods for differential equations.

    A step from noise level σ to σ' takes the latent x to x + (σ' - σ)·d, with the direction d = (x - denoised) / σ. A skipped step
    takes a forecast direction d̂. Once the full evaluation after a gap is done, the direction is known at both ends of the gap. The line
    between them, d̃, is a better estimate for the steps inside the gap than a forecast from one end. So x lacks about

        e = Σ over the gap of (σ_j+1 - σ_j)·(d̃_j - d̂_j)

    The full evaluation took this error for noise, and the sampler removes it as it removes noise, until the next full evaluation, at
    σ_next, sees the latent again. By then e·σ_next/σ is left of it, and the steps up to there add this much to x. They do so through
    their denoised latents, each shifted by the same amount: a single step would need a shift many times as large, which previews would
    show. Nothing here is fitted. docs/method.md, section 6, has the equations; docs/benchmarks.md has the measured gain.

    It keeps three tensors of the latent's size.

    Args:
        timeline: Noise levels and times of the run.
        plan: Plan of the run.

    Attributes:
        corrected: Number of full evaluations so far that corrected the error of a gap.
    """

    def __init__(self, timeline: Timeline, plan: Plan) -> None:
        self._timeline, self._plan = timeline, plan
        self.corrected = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all directions. The next correction then needs two more full evaluations."""
        self._last = -1  # step of the last evaluation
        self._full = -1  # step of the last full evaluation
        self._before: Tensor | None = None  # direction at the last full evaluation
        self._taken: Tensor | None = None  # Σ (σ_j+1 - σ_j)·d̂_j over the steps skipped since then
        self._shift: Tensor | None = None  # is added to every denoised latent up to the next full evaluation

    def answer(self, evaluation: Evaluation, latent: Tensor, denoised: Tensor) -> Tensor:
        """Returns the denoised latent for the sampler: `denoised`, or a shifted copy from a full evaluation after a gap on.

        Args:
            evaluation: The evaluation that just ended.
            latent: Its input, as the sampler has it.
            denoised: Its answer after guidance, in the shape of `latent`. Neither tensor is written to.
        """
        step, is_full = evaluation.step, evaluation.planned is Kind.FULL
        if step != self._last + 1:
            self.clear()
        if not evaluation.calls or not (is_full or evaluation.skipped):  # another node answered, or it is conservative or incremental
            self.clear()
            return denoised
        self._last = step
        direction = (latent - denoised) / self._timeline.sigmas[step]
        if is_full:
            error, share = self._error(step, direction), self._share(step)
            self._full, self._before, self._taken = step, direction, None
            self._shift = share * error if error is not None and share else None
            self.corrected += self._shift is not None
        elif self._before is not None:
            taken = self._change(step) * direction
            self._taken = taken if self._taken is None else self._taken + taken
        return denoised if self._shift is None else denoised + self._shift

    def _error(self, step: int, direction: Tensor) -> Tensor | None:
        """Returns e, the change that the latent lacks. None if nothing was skipped, or if both ends of the gap have the same time.

        Args:
            step: The full step after the gap.
            direction: The direction there.
        """
        if self._before is None or self._taken is None:
            return None
        start, *gap, end = self._timeline.times[self._full : step + 1]
        if start == end:  # in models with discrete timesteps, several small noise levels share one time
            return None
        changes = [self._change(j) for j in range(self._full + 1, step)]
        after = sum(change * (time - start) / (end - start) for change, time in zip(changes, gap))
        return (sum(changes) - after) * self._before + after * direction - self._taken

    def _share(self, step: int) -> float:
        """Returns the share of the error that is added to each denoised latent; 0 at the last full evaluation of a run.

        A shift of step j's denoised latent changes the next latent by 1 - σ_j+1 / σ_j of the shift.
        """
        sigmas, steps = self._timeline.sigmas, self._timeline.steps
        seen_again = next((j for j in range(step + 1, steps) if self._plan[j] is Kind.FULL), None)
        if seen_again is None:  # the final latent is as the model answers it
            return 0.0
        reached = sum(1 - sigmas[j + 1] / sigmas[j] for j in range(step, seen_again))
        return sigmas[seen_again] / sigmas[step] / reached if reached else 0.0

    def _change(self, step: int) -> float:
        """Returns σ_step+1 - σ_step, the change of the noise level in a step."""
        return self._timeline.sigmas[step + 1] - self._timeline.sigmas[step]

"""Makes up, at a full evaluation, for what the skipped ones before it got wrong."""

from __future__ import annotations

from torch import Tensor

from .meter import Evaluation
from .planning.kinds import Kind
from .planning.plan import Plan
from .planning.timeline import Timeline


class Corrector:
    """The corrector to the predictors, as in predictor-corrector methods for differential equations; for Euler's method.

    A step from noise level σ to σ' takes the latent x to x + (σ' - σ)·d, with the direction d = (x - denoised) / σ. Skipped steps
    take a forecast d̂. The full evaluation behind a gap knows the direction at its other end, and what lies between two ends is known
    better (d̃, on the line between them) than what lies beyond one. So x is off by about

        e = Σ over the gap of (σ_j+1 - σ_j)·(d̃_j - d̂_j)

    The full evaluation already saw that as noise, and takes it away as it takes noise away, until the next full evaluation, at σ_next,
    sees the latent again. What would be left of it then, e·σ_next/σ, is what the steps up to there are to add to x. They do so by
    way of their denoised latents, all by the same amount: in a preview one step alone would show it many times as large.
    Nothing here is fitted; docs/benchmarks.md has what it is worth.

    timeline, plan: of the run. corrected: full evaluations corrected so far. Keeps three tensors of the latent's size.
    """

    def __init__(self, timeline: Timeline, plan: Plan) -> None:
        self._timeline, self._plan = timeline, plan
        self.corrected = 0
        self.clear()

    def clear(self) -> None:
        """Forgets all directions: nothing is corrected before two more full evaluations."""
        self._last = -1  # step of the last evaluation
        self._full = -1  # step of the last full one
        self._before: Tensor | None = None  # direction there
        self._taken: Tensor | None = None  # Σ (σ_j+1 - σ_j)·d̂_j over the steps skipped since
        self._shift: Tensor | None = None  # of denoised latents, up to the next full evaluation

    def answer(self, evaluation: Evaluation, latent: Tensor, denoised: Tensor) -> Tensor:
        """What the sampler is to get in place of `denoised`: itself, but from a full evaluation behind a gap on. Neither is written to."""
        step, is_full = evaluation.step, evaluation.planned is Kind.FULL
        if step != self._last + 1:
            self.clear()
        if not evaluation.calls or not (is_full or evaluation.skipped):  # another node answered, or it is no forecast
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
        """How far the latent should be from where it is; None where nothing was skipped, or no time passed."""
        if self._before is None or self._taken is None:
            return None
        start, *gap, end = self._timeline.times[self._full : step + 1]
        if start == end:  # models with discrete timesteps have one for several small noise levels
            return None
        changes = [self._change(j) for j in range(self._full + 1, step)]
        after = sum(change * (time - start) / (end - start) for change, time in zip(changes, gap))
        return (sum(changes) - after) * self._before + after * direction - self._taken

    def _share(self, step: int) -> float:
        """Of the error, what is added to each denoised latent; it reaches the next latent as 1 - σ_j+1 / σ_j of itself."""
        sigmas, steps = self._timeline.sigmas, self._timeline.steps
        seen_again = next((j for j in range(step + 1, steps) if self._plan[j] is Kind.FULL), None)
        if seen_again is None:  # what leaves the run, denoised or not, is as the model answers it
            return 0.0
        reached = sum(1 - sigmas[j + 1] / sigmas[j] for j in range(step, seen_again))
        return sigmas[seen_again] / sigmas[step] / reached if reached else 0.0

    def _change(self, step: int) -> float:
        return self._timeline.sigmas[step + 1] - self._timeline.sigmas[step]

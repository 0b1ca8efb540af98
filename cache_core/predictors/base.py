"""What a predictor is: weights of a linear combination of what was computed before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor


class Predictor:
    """Says how past features combine into a missing one. Predictors are frozen dataclasses.

    Reuse, Taylor series and ridge regressions on time are all linear in the history with weights that
    depend on times only, so a predictor is a few numbers a step and works at any feature size.

    history: how many past features are kept at most. uses_input: whether `correction` is to be added; the
    features are then hidden state minus embedded input, and the model's input is kept beside them.
    """

    history: int
    uses_input: ClassVar[bool] = False

    def weights(self, anchors: Sequence[float], time: float) -> list[float]:
        """One weight per anchor, oldest first, for the feature at `time`.

        anchors: distinct times (0..1) of 1 to `history` features, in the order they were computed.
        """
        raise NotImplementedError

    @property
    def without_input(self) -> Predictor:
        """What to take instead where the input is not known. Only with uses_input."""
        raise NotImplementedError

    def correction(self, anchors: Sequence[float], time: float) -> Tensor:
        """A (d, C) float32: (input - Σ weight · anchor input) @ A is added to the combination. Only with uses_input."""
        raise NotImplementedError


def interpolating_weights(anchors: Sequence[float], time: float) -> list[float]:
    """Lagrange's weights: the value at `time` of the polynomial through all anchors."""
    result = []
    for i, own in enumerate(anchors):
        weight = 1.0
        for j, other in enumerate(anchors):
            if j != i:
                weight *= (time - other) / (own - other)
        result.append(weight)
    return result


def damped_line(anchors: Sequence[float], time: float, reach: float) -> list[float]:
    """The line through the last two anchors, followed for at most `reach` times their distance and held from there."""
    if len(anchors) == 1:
        return [1.0]
    before, last = anchors[-2:]
    ahead = min((time - last) / (last - before), reach)
    return [0.0] * (len(anchors) - 2) + [-ahead, 1.0 + ahead]

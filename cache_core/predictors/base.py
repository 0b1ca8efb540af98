"""What a predictor is: weights of a linear combination of what was computed before."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol


class Predictor(Protocol):
    """Says how past features combine into a missing one. Predictors are frozen dataclasses that hold no tensors.

    Reuse, Taylor series and ridge regressions on time are all linear in the history with weights that
    depend on times only, so a predictor is a few numbers a step and works at any feature size.
    """

    @property
    def history(self) -> int:
        """How many past features are kept at most."""
        ...

    def weights(self, anchors: Sequence[float], time: float) -> list[float]:
        """One weight per anchor, oldest first, for the feature at `time`.

        anchors: distinct times (0..1) of 1 to `history` features, in the order they were computed.
        """
        ...


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

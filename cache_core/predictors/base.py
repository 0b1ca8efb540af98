"""The interface of predictors, which forecast a feature as a linear combination of past ones, and helpers for their weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from torch import Tensor


class Predictor:
    """Gives the weights with which past features combine into a missing one. Predictors are frozen dataclasses.

    Reuse, Taylor series and ridge regressions on time are all linear in the past features, with weights that depend on times only. So a
    predictor is a few numbers per step and works at any feature size.

    Attributes:
        history: Largest number of past features that are kept.
        uses_input: Whether `correction` is added. The features are then the hidden state minus the embedded input, and the model's input is
            kept with each of them.
    """

    history: int
    uses_input: ClassVar[bool] = False

    def weights(self, anchors: Sequence[float], time: float) -> list[float]:
        """Returns the weights for the feature at `time`, one per anchor, oldest first.

        Args:
            anchors: Distinct times (0..1) of 1 to `history` past features, oldest first.
            time: The model's time (0..1) of the missing feature.
        """
        raise NotImplementedError

    @property
    def without_input(self) -> Predictor:
        """The predictor to use instead if the model's input is not known. Only with `uses_input`."""
        raise NotImplementedError

    def correction(self, anchors: Sequence[float], time: float) -> Tensor:
        """Returns the matrix A (d, C) in float32 of the correction. Only with `uses_input`.

        (input - Σ weight · input of the anchor) @ A is added to the combination, with d and C the channels of an input and of a hidden
        token. Arguments are those of `weights`.
        """
        raise NotImplementedError


def interpolating_weights(anchors: Sequence[float], time: float) -> list[float]:
    """Returns Lagrange's weights, which evaluate the polynomial through all anchors at `time`."""
    result = []
    for i, own in enumerate(anchors):
        weight = 1.0
        for j, other in enumerate(anchors):
            if j != i:
                weight *= (time - other) / (own - other)
        result.append(weight)
    return result


def damped_line(anchors: Sequence[float], time: float, reach: float) -> list[float]:
    """Returns weights that extrapolate the line through the last two anchors.

    Args:
        anchors: Times of the anchors, oldest first. With a single one, its feature is repeated.
        time: The model's time of the missing feature.
        reach: How far the line is followed, in distances between the last two anchors. Beyond that its value is held.
    """
    if len(anchors) == 1:
        return [1.0]
    before, last = anchors[-2:]
    ahead = min((time - last) / (last - before), reach)
    return [0.0] * (len(anchors) - 2) + [-ahead, 1.0 + ahead]

"""A predictor that uses the input as a calibrated forecast does, with a given matrix."""

from __future__ import annotations

from collections.abc import Sequence

from comfyui_duca.cache_core.predictors import Predictor, Reuse
from torch import Tensor


class Innovating(Predictor):
    """Forecasts the last hidden state plus the input's change since then times `matrix` (d, C). Inputs are kept beside hidden states.

    Args:
        matrix: The matrix, (d, C).
        history: Number of hidden states that are kept.
    """

    uses_input = True

    def __init__(self, matrix: Tensor, history: int = 2) -> None:
        self.matrix, self.history = matrix, history

    def weights(self, anchors: Sequence[float], time: float) -> list[float]:
        return Reuse().weights(anchors, time)

    def correction(self, anchors: Sequence[float], time: float) -> Tensor:
        return self.matrix

    @property
    def without_input(self) -> Predictor:
        return Reuse()

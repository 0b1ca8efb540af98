"""A predictor that uses the input as a calibrated forecast does, with a matrix that a test says."""

from __future__ import annotations

from collections.abc import Sequence

from comfyui_duca.cache_core.predictors import Predictor, Reuse
from torch import Tensor


class Innovating(Predictor):
    """Reuse, and what the input moved by since, times `matrix` (d, C): the input is kept beside every hidden state.

    history: of how many hidden states.
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

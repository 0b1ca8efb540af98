"""The increment-calibrated forecast: the best fixed combination of history, corrected by how the input really moved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from .base import Predictor


@dataclass(frozen=True, eq=False)
class Calibrated(Predictor):
    """Weights and correction from a calibration (METHOD section 3).

    fit: gives weights, correction (d, r) and error for (anchor times, time). basis (C, r): where corrections live.
    history: anchors kept.
    """

    fit: Callable[[Sequence[float], float], Any]
    basis: Tensor
    history: int = 3
    uses_input: ClassVar[bool] = True

    def weights(self, anchors: Sequence[float], time: float) -> list[float]:
        return list(self.fit(anchors, time).weights)

    def correction(self, anchors: Sequence[float], time: float) -> Tensor:
        return self.fit(anchors, time).correction @ self.basis.T

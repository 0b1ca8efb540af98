"""The predictor that repeats the last feature, as in DuCa's skipped evaluations and in FORA."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import Predictor


@dataclass(frozen=True)
class Reuse(Predictor):
    """Repeats the last feature."""

    history: int = 1

    def weights(self, anchors: Sequence[float], time: float) -> list[float]:
        return [0.0] * (len(anchors) - 1) + [1.0]

"""The Taylor predictor: extrapolation with divided differences (TaylorSeer, arXiv 2503.06923, but for uneven gaps)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .base import Predictor, interpolating_weights


@dataclass(frozen=True)
class Taylor(Predictor):
    """Extrapolates the polynomial through the last order+1 features.

    Divided differences replace the paper's finite differences because full evaluations need not be evenly spaced.

    Args:
        order: Degree of the polynomial, at least 1. It is lower while fewer features are known.

    Raises:
        ValueError: For an order below 1.
    """

    order: int = 1

    def __post_init__(self) -> None:
        if self.order < 1:
            raise ValueError(f"the order must be at least 1, not {self.order}; use Reuse for 0")

    @property
    def history(self) -> int:  # type: ignore[override]
        return self.order + 1

    def weights(self, anchors: Sequence[float], time: float) -> list[float]:
        used = anchors[-self.history :]
        return [0.0] * (len(anchors) - len(used)) + interpolating_weights(used, time)

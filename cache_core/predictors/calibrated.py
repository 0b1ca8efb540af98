"""The calibrated predictor: a combination of anchors, corrected by how the input really moved (docs/method.md, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from .base import Predictor
from .chebyshev import AUTO

_RECENT = 3  # last anchors that get calibrated weights; more brought no gain (docs/method.md, section 4.2)


class Statistics(Protocol):
    """What the predictor needs of a calibration. `calibration.statistics.ForecastModel` provides it."""

    @property
    def basis(self) -> Tensor: ...

    def least_squares(self, anchors: Sequence[float], time: float) -> list[float]: ...

    def fit(self, anchors: Sequence[float], time: float, weights: Sequence[float] | None = None) -> Any: ...


@dataclass(frozen=True, eq=False)
class Calibrated(Predictor):
    """Forecasts `ẑ = Σ w_j z_j + (u − Σ w_j u_j)·A` with statistics from a calibration.

    z is the hidden state minus the embedded input, and u the input. The weights w mix calibrated weights with those of an uncalibrated
    predictor, and A is fitted to the error that they leave. Calibrated weights have the smallest error in each single evaluation, but the
    errors of the uncalibrated ones cancel better from one gap to the next. A calibration tries out which mixture is best.

    Args:
        statistics: Statistics of the model.
        share: Share 0..1 of the calibrated weights in the mixture.
        prior: The uncalibrated predictor, which provides the other weights.
        history: Largest number of past features that are kept.
    """

    statistics: Statistics
    share: float = 1.0
    prior: Predictor = AUTO
    history: int = AUTO.history
    uses_input: ClassVar[bool] = True
    _fits: dict[tuple, Any] = field(default_factory=dict, repr=False)

    def weights(self, anchors: Sequence[float], time: float) -> list[float]:
        return list(self.fit(anchors, time).weights)

    @property
    def without_input(self) -> Predictor:
        return self.prior

    def correction(self, anchors: Sequence[float], time: float) -> Tensor:
        return self.fit(anchors, time).correction @ self.statistics.basis.T

    def fit(self, anchors: Sequence[float], time: float) -> Any:
        """Returns the weights, the correction and the expected errors as a `calibration.statistics.Fit`. Each is computed once and kept."""
        key = (*anchors, time)
        if key not in self._fits:
            recent = list(anchors[-_RECENT:])
            own = [0.0] * (len(anchors) - len(recent)) + self.statistics.least_squares(recent, time)
            prior = self.prior.weights(anchors, time)
            mixed = [self.share * a + (1 - self.share) * b for a, b in zip(own, prior)]
            self._fits[key] = self.statistics.fit(anchors, time, mixed)
        return self._fits[key]

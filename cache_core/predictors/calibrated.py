"""The increment-calibrated forecast: a combination of history, corrected by how the input really moved (docs/method.md, section 4.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Protocol

from torch import Tensor

from .base import Predictor
from .chebyshev import AUTO

_RECENT = 3  # anchors that calibrated weights go to; more bring nothing (docs/method.md, section 4.2)


class Statistics(Protocol):
    """What a calibration knows of a model: see calibration.statistics.ForecastModel, which is one."""

    @property
    def basis(self) -> Tensor: ...

    def least_squares(self, anchors: Sequence[float], time: float) -> list[float]: ...

    def fit(self, anchors: Sequence[float], time: float, weights: Sequence[float] | None = None) -> Any: ...


@dataclass(frozen=True, eq=False)
class Calibrated(Predictor):
    """`ẑ = Σ w_j z_j + (u − Σ w_j u_j)·A`: w partly from calibration and partly from the uncalibrated setting, A fitted to what w leaves.

    statistics: of the model. share: of the calibrated weights, 0..1; the rest are `prior`'s. Calibrated weights err least on
    each evaluation, the prior's errors cancel better from one gap to the next; which mixture is best, calibration tries out.
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
        """Weights, correction and expected errors; each computed once."""
        key = (*anchors, time)
        if key not in self._fits:
            recent = list(anchors[-_RECENT:])
            own = [0.0] * (len(anchors) - len(recent)) + self.statistics.least_squares(recent, time)
            prior = self.prior.weights(anchors, time)
            mixed = [self.share * a + (1 - self.share) * b for a, b in zip(own, prior)]
            self._fits[key] = self.statistics.fit(anchors, time, mixed)
        return self._fits[key]

"""The Chebyshev predictor: ridge regression over time, blended with a first-order Taylor term (Spectrum, arXiv 2603.01623)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.polynomial.chebyshev import chebvander

from .base import Predictor, damped_line


@dataclass(frozen=True)
class Chebyshev(Predictor):
    """Fits Chebyshev polynomials to the known features by ridge least squares and evaluates them at the missing time.

    The result is blended with a first-order Taylor term. With fewer than three known features, only the Taylor term is used. The defaults
    are Spectrum's.

    Args:
        degree: Highest degree of the polynomials. It is lower while fewer features are known.
        ridge: λ, added to the diagonal of ΦᵀΦ.
        taylor_share: Weight 0..1 of the Taylor term.
        history: Largest number of past features that are kept.
        reach: How far the Taylor term is followed, in distances between the last two features. This bound is ours; Spectrum has none.
    """

    degree: int = 4
    ridge: float = 0.1
    taylor_share: float = 0.5
    history: int = 8
    reach: float = math.inf

    def weights(self, anchors: Sequence[float], time: float) -> list[float]:
        n = len(anchors)
        taylor = damped_line(anchors, time, self.reach)
        if n < 3:
            return taylor
        degree = min(self.degree, n - 1)
        basis = chebvander(_unit(np.asarray(anchors)), degree)  # (n, degree+1)
        target = chebvander(_unit(np.asarray([time])), degree)[0]  # (degree+1,)
        gram = basis.T @ basis + self.ridge * np.eye(degree + 1)
        fitted = basis @ np.linalg.solve(gram, target)  # (n,)
        return (self.taylor_share * np.asarray(taylor) + (1 - self.taylor_share) * fitted).tolist()


AUTO = Chebyshev(taylor_share=0.7, history=5, reach=0.7)  # best uncalibrated setting in docs/benchmarks.md


def _unit(times: np.ndarray) -> np.ndarray:
    """Maps times 0..1 to the polynomials' interval -1..1."""
    return np.clip(2 * times - 1, -1, 1)

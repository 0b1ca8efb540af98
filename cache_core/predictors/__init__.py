"""The predictors, which fill skipped evaluations. Each has a file of its own, and each that users may choose a line in `PREDICTORS`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType

from .base import Predictor
from .calibrated import Calibrated
from .chebyshev import AUTO, Chebyshev
from .reuse import Reuse
from .taylor import Taylor

PREDICTORS: Mapping[str, Callable[[], Predictor]] = MappingProxyType(
    {
        "reuse": Reuse,
        "taylor1": partial(Taylor, order=1),
        "taylor2": partial(Taylor, order=2),
        "chebyshev": Chebyshev,
    }
)

__all__ = ["AUTO", "PREDICTORS", "Calibrated", "Chebyshev", "Predictor", "Reuse", "Taylor"]

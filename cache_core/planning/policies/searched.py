"""The policy that uses the plan which the search of a calibration expects to change the picture least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from .base import Request
from .given import Given


@dataclass(frozen=True)
class Searched(Given):
    """Uses a plan that was searched for the run."""

    about: ClassVar[str] = "full where a calibration expects it to help the picture most"
    takes: ClassVar[frozenset[str]] = frozenset({"speedup", "searched"})

    @classmethod
    def asked(cls, request: Request) -> Searched:
        """Searches a plan with `max(2, round(steps / speedup))` full evaluations.

        Raises:
            ValueError: If there is no calibration to search with.
            NotCoveredError: If the calibration does not cover the run.
        """
        if request.searched is None:
            raise ValueError(
                "a searched schedule needs a calibrated forecast of this model: run SVD Calibrator first, or choose another schedule"
            )
        return cls(request.searched(max(2, round(request.steps / request.speedup))))

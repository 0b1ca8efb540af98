"""HOW an evaluation is carried out: each kind is a context manager around one call of the host's model."""

from __future__ import annotations

from .call import EngineCall
from .conservative import conservative
from .full import listening, resting
from .linear_sites import CalibratedLinears
from .linears import calibrated
from .skip import skipping
from .slot import Slot, SlotTable
from .tokens import TokenChoice

__all__ = [
    "CalibratedLinears",
    "EngineCall",
    "Slot",
    "SlotTable",
    "TokenChoice",
    "calibrated",
    "conservative",
    "listening",
    "resting",
    "skipping",
]

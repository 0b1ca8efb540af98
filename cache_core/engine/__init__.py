"""Carries out evaluations: each kind is a context manager around one call of the host's model."""

from __future__ import annotations

from .call import EngineCall
from .conservative import conservative
from .full import listening, resting
from .incremental import incremental
from .linear_sites import FactorisedLayers
from .skip import skipping
from .slot import Slot, SlotTable
from .tokens import TokenSelection

__all__ = [
    "EngineCall",
    "FactorisedLayers",
    "Slot",
    "SlotTable",
    "TokenSelection",
    "conservative",
    "incremental",
    "listening",
    "resting",
    "skipping",
]

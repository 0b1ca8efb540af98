"""WHEN the model is evaluated in full: one file a policy, one line in the table."""

from __future__ import annotations

from types import MappingProxyType

from .always_compute import AlwaysCompute
from .base import Policy
from .duca_cycle import DucaCycle
from .fixed_interval import FixedInterval
from .front_loaded import FrontLoaded
from .given import Given
from .growing_gaps import GrowingGaps
from .icc_cycle import IccCycle
from .patterned import Patterned
from .within import Within

POLICIES = MappingProxyType(
    {
        "always_compute": AlwaysCompute,
        "duca_cycle": DucaCycle,
        "fixed_interval": FixedInterval,
        "front_loaded": FrontLoaded,
        "given": Given,
        "growing_gaps": GrowingGaps,
        "icc_cycle": IccCycle,
        "patterned": Patterned,
        "within": Within,
    }
)

__all__ = [
    "POLICIES",
    "AlwaysCompute",
    "DucaCycle",
    "FixedInterval",
    "FrontLoaded",
    "Given",
    "GrowingGaps",
    "IccCycle",
    "Patterned",
    "Policy",
    "Within",
]

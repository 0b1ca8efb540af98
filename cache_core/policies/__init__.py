"""WHEN the model is evaluated in full: one file a policy, one line in the table."""

from __future__ import annotations

from types import MappingProxyType

from .always_compute import AlwaysCompute
from .base import Policy
from .duca_cycle import DucaCycle
from .fixed_interval import FixedInterval
from .given import Given
from .growing_gaps import GrowingGaps
from .icc_cycle import IccCycle

POLICIES = MappingProxyType(
    {
        "always_compute": AlwaysCompute,
        "duca_cycle": DucaCycle,
        "fixed_interval": FixedInterval,
        "given": Given,
        "growing_gaps": GrowingGaps,
        "icc_cycle": IccCycle,
    }
)

__all__ = ["POLICIES", "AlwaysCompute", "DucaCycle", "FixedInterval", "Given", "GrowingGaps", "IccCycle", "Policy"]

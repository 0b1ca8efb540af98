"""WHEN the model is evaluated in full: one file a policy, one line in the table."""

from __future__ import annotations

from types import MappingProxyType

from .always_compute import AlwaysCompute
from .base import Policy
from .duca_cycle import DucaCycle
from .fixed_interval import FixedInterval
from .growing_gaps import GrowingGaps

POLICIES = MappingProxyType(
    {
        "always_compute": AlwaysCompute,
        "duca_cycle": DucaCycle,
        "fixed_interval": FixedInterval,
        "growing_gaps": GrowingGaps,
    }
)

__all__ = ["POLICIES", "AlwaysCompute", "DucaCycle", "FixedInterval", "GrowingGaps", "Policy"]

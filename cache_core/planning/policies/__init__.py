"""The policies, which make plans. Each has a file of its own, and each that users may choose has a line in `POLICIES`."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .always_compute import AlwaysCompute
from .base import OfferedPolicy, Policy, Request
from .duca_cycle import DucaCycle
from .fixed_interval import FixedInterval
from .front_loaded import FrontLoaded
from .given import Given
from .icc_cycle import IccCycle
from .patterned import Patterned
from .searched import Searched
from .within import Within

# Keys are the names that users see in Cache Schedule, in this order.
POLICIES: Mapping[str, type[OfferedPolicy]] = MappingProxyType(
    {
        "front-loaded": FrontLoaded,
        "DuCa cycle": DucaCycle,
        "fixed interval": FixedInterval,
        "searched": Searched,
        "custom text": Patterned,
    }
)

__all__ = [
    "POLICIES",
    "AlwaysCompute",
    "DucaCycle",
    "FixedInterval",
    "FrontLoaded",
    "Given",
    "IccCycle",
    "OfferedPolicy",
    "Patterned",
    "Policy",
    "Request",
    "Searched",
    "Within",
]

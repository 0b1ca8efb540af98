"""Feature caching for diffusion transformers in plain torch: no host import, no state outside a run.

`Settings` says what is wanted, `find_family` where, `CacheRun` does it for one sampling run.
"""

from __future__ import annotations

from .discovery.places import Places
from .families import FAMILIES, find_family
from .kinds import Kind, Plan
from .meter import RunReport
from .model_call import ModelCall
from .opening import Opening
from .run import CacheRun
from .store import StoreFormat
from .strategy import Settings
from .timeline import Timeline

__all__ = [
    "FAMILIES",
    "CacheRun",
    "Kind",
    "ModelCall",
    "Opening",
    "Places",
    "Plan",
    "RunReport",
    "Settings",
    "StoreFormat",
    "Timeline",
    "find_family",
]

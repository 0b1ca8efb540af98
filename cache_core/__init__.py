"""Caches features of diffusion transformers, in plain torch: no host is imported, and no state is kept outside a run.

`Settings` are a user's choices, `find_family` recognises the model, and `CacheRun` carries out one sampling run.
"""

from __future__ import annotations

from .discovery.places import Places
from .families import FAMILIES, find_family
from .meter import RunReport
from .model_call import ModelCall
from .planning.kinds import Kind
from .planning.plan import Plan
from .planning.timeline import Timeline
from .run import CacheRun
from .run_start import RunStart
from .store import StoreFormat
from .strategy import Settings

__all__ = [
    "FAMILIES",
    "CacheRun",
    "Kind",
    "ModelCall",
    "Places",
    "Plan",
    "RunReport",
    "RunStart",
    "Settings",
    "StoreFormat",
    "Timeline",
    "find_family",
]

"""The pack's nodes: one file for each. Node ids and the order of their inputs do not change once released."""

from __future__ import annotations

from comfy_api.latest import ComfyExtension, io

from .cache_compare import CacheCompare
from .cache_report import CacheReport
from .cache_schedule import CacheSchedule
from .cache_sweep import CacheSweep
from .demo_flux import DemoFlux
from .duca_cache import DucaCache
from .imagenet_class import ImageNetClass
from .load_calibration import LoadCalibration
from .load_dit import LoadDiT
from .page import routes
from .prompt_list import PromptList
from .svd_calibrator import SvdCalibrator


class DucaExtension(ComfyExtension):
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        return [
            DucaCache,
            CacheSchedule,
            CacheReport,
            CacheCompare,
            CacheSweep,
            SvdCalibrator,
            LoadCalibration,
            PromptList,
            DemoFlux,
            LoadDiT,
            ImageNetClass,
        ]


async def comfy_entrypoint() -> DucaExtension:
    routes.register()
    return DucaExtension()

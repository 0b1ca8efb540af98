"""Node DuCa Cache: gives a MODEL a cache, so that sampling skips many of its evaluations."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..cache_core import Settings
from ..cache_core.checks import check_number
from ..cache_core.predictors import PREDICTORS
from ..cache_core.strategy import MODES
from . import host, sidecars
from .inputs import fields
from .inputs.settings import STORE_DEVICES, STORE_DTYPES, settings_of
from .sidecars.calibrations import SEARCHING_MODES


class DucaCache(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaCache",
            display_name="DuCa Cache",
            category="model_patches/duca",
            description="Makes a diffusion transformer sample faster: many evaluations are skipped and filled from the results of earlier "
            "ones.",
            inputs=[
                io.Model.Input("model", tooltip="The model to speed up. Put this node last, right before the sampler."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip="auto: the best setting we measured; uses the checkpoint's calibration, if SVD Calibrator made one. "
                    "paper: DuCa's cycle of full, conservative (attention from the cache, some tokens recomputed) and skipped evaluations. "
                    "forecast: with a predictor and a cycle length that you choose. off: no cache, the image is the same as without "
                    "this node. icc: full evaluations, and incremental ones between them (kept outputs of linear layers plus a low-rank "
                    "increment); needs a calibration.",
                ),
                io.Float.Input(
                    "speedup",
                    default=2.0,
                    min=1.0,
                    max=6.0,
                    step=0.1,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="How many times fewer full evaluations: at 2, half of them. 1 computes all; 2 is safe; above 3 look at the "
                    "image.",
                ),
                *_advanced_inputs(),
                fields.Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="From SVD Calibrator or Load Calibration. Not connected, modes auto and icc look for the checkpoint's own.",
                ),
                fields.Schedule.Input(
                    "schedule",
                    optional=True,
                    tooltip="From Cache Schedule: says which steps are full, in place of speedup and the numbers of steps here. The mode "
                    "still says how the others are filled.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the cache on it.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # two equal nodes each show their own runs, so the host must not use one's output for both
        )

    @classmethod
    def validate_inputs(
        cls, start_percent: float | None = None, end_percent: float | None = None, calibration: Any = None, schedule: Any = None
    ) -> bool | str:
        """Checks the order of the two percents and the types of links. Inputs from other nodes are None here; `Settings` checks them."""
        start, end = 0.0 if start_percent is None else start_percent, 1.0 if end_percent is None else end_percent
        try:
            check_number("start_percent", start, 0, 1)
            check_number("end_percent", end, 0, 1)
            Settings(calibration=calibration, schedule=schedule)
        except ValueError as error:
            return str(error)
        return True if start <= end else f"start_percent ({start:g}) lies after end_percent ({end:g})"

    @classmethod
    def fingerprint_inputs(cls, mode: str | None = None, **inputs: Any) -> tuple:
        """Makes the host sample again when calibration files changed, if the node may look for one. Inputs from other nodes are None."""
        may_search = mode in (None, *SEARCHING_MODES) or "schedule" in inputs
        is_searching = "calibration" not in inputs and may_search
        return sidecars.state() if is_searching else ()

    @classmethod
    def execute(cls, model: io.Model.Type, verbose: bool, **given: Any) -> io.NodeOutput:
        settings = settings_of(**given)
        options = host.HostOptions(given["store_device"] == "auto", verbose, cls.hidden.unique_id)
        return io.NodeOutput(host.attach(model, settings, options))


def _advanced_inputs() -> list[io.Input]:
    percent = {"min": 0.0, "max": 1.0, "step": 0.01}
    return [
        fields.advanced(field)
        for field in (
            io.Combo.Input(
                "predictor",
                options=list(PREDICTORS),
                default="chebyshev",
                tooltip="Mode forecast: how a skipped evaluation is filled from the results of earlier ones.",
            ),
            io.Int.Input(
                "cycle_length",
                default=0,
                min=0,
                max=100,
                tooltip="Modes paper, forecast and icc: steps from one full evaluation to the next (N in the paper, which uses 5 for "
                "FLUX). 0 follows speedup.",
            ),
            io.Float.Input(
                "token_share",
                default=0.1,
                tooltip="Mode paper, and schedules with c: share of the tokens that a conservative evaluation recomputes.",
                **percent,
            ),
            io.Int.Input(
                "warmup",
                default=-1,
                min=-1,
                max=100,
                tooltip="Full steps at the beginning. -1 is the usual number: 3 in mode paper, and in mode forecast with a cycle_length; "
                "else 1. Mode auto does not use it.",
            ),
            io.Int.Input("tail", default=0, min=0, max=100, tooltip="Full steps at the end."),
            io.Float.Input(
                "start_percent",
                default=0.0,
                tooltip="Everything before this part of the sampling is full: 0 is its beginning, 1 its end.",
                **percent,
            ),
            io.Float.Input(
                "end_percent",
                default=1.0,
                tooltip="Everything after this part of the sampling is full: 0 is its beginning, 1 its end.",
                **percent,
            ),
            io.Combo.Input(
                "store_device",
                options=list(STORE_DEVICES),
                default="auto",
                tooltip="Where the cache is kept. auto: on the GPU, or in system memory if it would take more than half of the free GPU "
                "memory.",
            ),
            io.Combo.Input(
                "store_dtype",
                options=list(STORE_DTYPES),
                default="model dtype",
                tooltip="In what precision the cache is kept. fp8 takes half the memory of bf16 and costs a little accuracy.",
            ),
            io.Int.Input(
                "token_seed",
                default=0,
                min=0,
                max=2**32 - 1,
                tooltip="Mode paper, and schedules with c: seed of the random choice of recomputed tokens.",
            ),
            io.Boolean.Input("verbose", default=False, tooltip="Writes every evaluation to the log."),
        )
    ]

"""Node DuCa Cache: MODEL in, the same MODEL with most of its evaluations skipped out."""

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
            description="Makes a diffusion transformer faster: most sampler evaluations reuse or forecast the work of earlier ones.",
            inputs=[
                io.Model.Input("model", tooltip="The model to speed up. Put this node last, right before the sampler."),
                io.Combo.Input(
                    "mode",
                    options=list(MODES),
                    default="auto",
                    tooltip="auto: the best setting we measured, calibrated where SVD Calibrator has seen the checkpoint. "
                    "paper: DuCa's cycle of full, conservative and aggressive evaluations. "
                    "forecast: your own choice of predictor and gaps. off: no cache, image identical to no node. "
                    "icc: blocks run over low-rank increments of their layers; needs a calibration.",
                ),
                io.Float.Input(
                    "speedup",
                    default=2.0,
                    min=1.0,
                    max=6.0,
                    step=0.1,
                    display_mode=io.NumberDisplay.slider,
                    tooltip="How many times fewer full evaluations. 1 computes everything; 2 is safe; above 3 look at the image.",
                ),
                *_advanced_inputs(),
                fields.Calibration.Input(
                    "calibration",
                    optional=True,
                    tooltip="From SVD Calibrator or Load Calibration. Without it the checkpoint's own is looked for in modes auto and icc.",
                ),
                fields.Schedule.Input(
                    "schedule",
                    optional=True,
                    tooltip="From Cache Schedule: says which evaluations are full, in place of the slider and the numbers of steps here.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model with the cache on it.")],
            hidden=[io.Hidden.unique_id],
            not_idempotent=True,  # of two equal nodes each tells the page of its own runs, so the host must not take one's output for both
        )

    @classmethod
    def validate_inputs(
        cls, start_percent: float | None = None, end_percent: float | None = None, calibration: Any = None, schedule: Any = None
    ) -> bool | str:
        """The host checks the other numbers' ranges and `Settings` the rest; None stands for what another node will give."""
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
        """What looks for a calibration samples anew when there is another file. Inputs from other nodes are None here."""
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
                tooltip="Mode forecast: how a skipped evaluation is filled from earlier ones.",
            ),
            io.Int.Input(
                "cycle_length",
                default=0,
                min=0,
                max=100,
                tooltip="Steps from one full evaluation to the next (N in the paper, which uses 5 for FLUX). 0 follows the speedup slider.",
            ),
            io.Float.Input(
                "token_share",
                default=0.1,
                tooltip="Mode paper: share of the tokens that a conservative evaluation recomputes.",
                **percent,
            ),
            io.Int.Input(
                "warmup",
                default=-1,
                min=-1,
                max=100,
                tooltip="Full steps at the beginning. -1 takes the mode's own: 3 in mode paper, and in mode forecast with a cycle length; "
                "else 1. Not in mode auto.",
            ),
            io.Int.Input("tail", default=0, min=0, max=100, tooltip="Full steps at the end."),
            io.Float.Input("start_percent", default=0.0, tooltip="Nothing is skipped before this part of the sampling.", **percent),
            io.Float.Input("end_percent", default=1.0, tooltip="Nothing is skipped after this part of the sampling.", **percent),
            io.Combo.Input(
                "store_device",
                options=list(STORE_DEVICES),
                default="auto",
                tooltip="Where features are kept. auto: on the GPU unless that would take half of its free memory.",
            ),
            io.Combo.Input(
                "store_dtype",
                options=list(STORE_DTYPES),
                default="model dtype",
                tooltip="In what precision features are kept. fp8 halves the memory of bf16 and costs a little accuracy.",
            ),
            io.Int.Input("token_seed", default=0, min=0, max=2**32 - 1, tooltip="Mode paper: which random tokens are recomputed."),
            io.Boolean.Input("verbose", default=False, tooltip="Write every evaluation to the log."),
        )
    ]

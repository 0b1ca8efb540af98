"""Node Cache Sweep: one prompt sampled without a cache and at several speed-ups, to find one's own limit."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..cache_core.checks import check_one_of
from . import sidecars
from .inputs.fields import guidance_field, sampler_fields
from .inputs.speedups import FASTEST, MOST, parse_speedups
from .pictures.comparison import output, outputs, score
from .pictures.sweep import Run, draw, in_fewer_steps
from .sidecars.calibrations import SEARCHING_MODES

_MODES = ("auto", "paper", "forecast")
_PER_LINE = 6  # of the grid, beside the reference


class CacheSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaCacheSweep",
            display_name="Cache Sweep",
            category="model_patches/duca",
            description="Samples without a cache, then at each speed-up, and shows the pictures beside each other with their distance, "
            "time and compute: find the speed-up that you still like. Takes as long as all of them.",
            inputs=_inputs(),
            outputs=[
                *outputs(),
                io.Image.Output(display_name="images", tooltip="The pictures themselves, without a cache first, in the table's order."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, speedups: str | None = None) -> bool | str:
        """None stands for what another node will give."""
        try:
            return speedups is None or bool(parse_speedups(speedups))
        except ValueError as wrong:
            return str(wrong)

    @classmethod
    def fingerprint_inputs(cls, mode: str | None = None, **inputs: Any) -> tuple:
        """What looks for a calibration samples anew when there is another file."""
        return sidecars.state() if mode in (None, *SEARCHING_MODES) else ()

    @classmethod
    def execute(
        cls, model: io.Model.Type, vae: io.Vae.Type, mode: str, speedups: str, fewer_steps: bool, steps: int, **given: Any
    ) -> io.NodeOutput:
        check_one_of("mode", mode, _MODES)  # one that comes by link was not checked by the host
        reference = Run(f"no cache, {steps} steps", steps)
        cached = [Run(f"{mode} {speed:g}x", steps, speed) for speed in parse_speedups(speedups)]
        fewer = [in_fewer_steps(run) for run in cached] if fewer_steps else []
        order = [reference, *(run for pair in zip(cached, fewer) for run in pair)] if fewer else [reference, *cached]
        given |= {"latent": given.pop("latent_image"), "seed": given.pop("noise_seed")}
        rows = draw(model, vae, mode, list(dict.fromkeys(order)), given, cls.hidden.unique_id)
        entries = dict(zip(rows, score(rows[reference], [row for run, row in rows.items() if run != reference])))
        parts = [slice(at, at + _PER_LINE) for at in range(0, len(cached), _PER_LINE)]
        lines = [[entries[run] for run in runs[part]] for part in parts for runs in (cached, fewer) if runs]
        return output(cls, [entries[run] for run in order], lines, torch.cat([rows[run].pictures for run in order]))


def _inputs() -> list[io.Input]:
    return [
        io.Model.Input("model", tooltip="The model to try. A DuCa Cache already on it is replaced."),
        io.Conditioning.Input("positive", tooltip="The prompt."),
        io.Conditioning.Input("negative", tooltip="The negative prompt."),
        io.Latent.Input("latent_image", tooltip="An empty latent of the size you work at, or a picture's."),
        io.Vae.Input("vae", tooltip="Decodes what was sampled."),
        io.Int.Input(
            "noise_seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,  # a seed of this name would else be randomised, and everything sampled again
            tooltip="The same for all runs, so that only the cache makes a difference. Stays as it is until you change it.",
        ),
        io.Int.Input("steps", default=28, min=2, max=200, tooltip="The number of steps you work with."),
        guidance_field(),
        *sampler_fields(),
        io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip="Below 1 keeps some of the latent's picture."),
        io.Combo.Input("mode", options=list(_MODES), default="auto", tooltip="The mode of DuCa Cache that is tried."),
        io.String.Input(
            "speedups",
            default="1.5, 2, 2.8, 3.5, 5",
            tooltip=f"The speed-ups to try, 1 to {FASTEST}, at most {MOST}. Without a cache, which is 1, is always sampled.",
        ),
        io.Boolean.Input(
            "fewer_steps",
            default=True,
            tooltip="Also sample without a cache in so few steps that it is as fast: the honest comparison for each speed-up.",
        ),
    ]

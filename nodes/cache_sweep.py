"""Node Cache Sweep: samples one prompt without a cache and at several speed-ups, so that users find their own limit."""

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
_PER_LINE = 6  # pictures in a line of the grid, beside the reference


class CacheSweep(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaCacheSweep",
            display_name="Cache Sweep",
            category="model_patches/duca",
            description="Samples one prompt without a cache, then at each speed-up, and shows the pictures side by side with PSNR, SSIM, "
            "time and compute, to find the highest speed-up that you still like. Takes as long as all these samplings together.",
            inputs=_inputs(),
            outputs=[
                *outputs(),
                io.Image.Output(display_name="images", tooltip="The pictures alone, in the order of the table: the uncached one first."),
            ],
            hidden=[io.Hidden.unique_id],
            is_output_node=True,
        )

    @classmethod
    def validate_inputs(cls, speedups: str | None = None) -> bool | str:
        """Checks the list of speed-ups. It is None where another node will give it."""
        try:
            return speedups is None or bool(parse_speedups(speedups))
        except ValueError as wrong:
            return str(wrong)

    @classmethod
    def fingerprint_inputs(cls, mode: str | None = None, **inputs: Any) -> tuple:
        """Makes the host sample again when calibration files changed, in modes that look for one."""
        return sidecars.state() if mode in (None, *SEARCHING_MODES) else ()

    @classmethod
    def execute(
        cls, model: io.Model.Type, vae: io.Vae.Type, mode: str, speedups: str, fewer_steps: bool, steps: int, **given: Any
    ) -> io.NodeOutput:
        check_one_of("mode", mode, _MODES)  # the host does not check a value that comes over a link
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
        io.Latent.Input("latent_image", tooltip="An empty latent of your usual size, or the latent of a picture."),
        io.Vae.Input("vae", tooltip="Decodes the sampled latents."),
        io.Int.Input(
            "noise_seed",
            default=0,
            min=0,
            max=0xFFFFFFFFFFFFFFFF,
            control_after_generate=False,  # else the page would change the seed after every run, and all would be sampled again
            tooltip="One seed for all runs, so that only the cache makes a difference. It stays until you change it.",
        ),
        io.Int.Input("steps", default=28, min=2, max=200, tooltip="Your usual number of steps."),
        guidance_field(),
        *sampler_fields(),
        io.Float.Input("denoise", default=1.0, min=0.01, max=1.0, step=0.01, tooltip="Below 1 keeps some of the latent's picture."),
        io.Combo.Input("mode", options=list(_MODES), default="auto", tooltip="The mode of DuCa Cache to try."),
        io.String.Input(
            "speedups",
            default="1.5, 2, 2.8, 3.5, 5",
            tooltip=f"The speed-ups to try, separated by commas: 1 to {FASTEST}, at most {MOST}. 1, without a cache, is always sampled.",
        ),
        io.Boolean.Input(
            "fewer_steps",
            default=True,
            tooltip="For each speed-up, also sample without a cache in so few steps that it takes as long: the fair comparison.",
        ),
    ]

"""Defines inputs that several nodes share, and the types of the pack's own links."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

Calibration = io.Custom("DUCA_CALIBRATION")
Schedule = io.Custom("DUCA_SCHEDULE")


def advanced(field: io.Input) -> io.Input:
    """Marks an input as advanced, so that the page folds it away, and returns it."""
    field.extra_dict = {**(field.extra_dict or {}), "advanced": True}
    return field


def sampler_fields() -> list[io.Input]:
    """Returns the inputs that choose one of the host's samplers and schedulers."""
    return [
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler", tooltip="Your usual sampler."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="Your usual scheduler."),
    ]


def guidance_field() -> io.Input:
    return io.Float.Input("cfg", default=2.5, min=0.0, max=100.0, step=0.1, tooltip="Your usual cfg.")

"""Defines inputs that several nodes have, and the types of the pack's own sockets."""

from __future__ import annotations

import comfy.samplers
from comfy_api.latest import io

Calibration = io.Custom("DUCA_CALIBRATION")
Schedule = io.Custom("DUCA_SCHEDULE")


def advanced(field: io.Input) -> io.Input:
    """Marks an input as one that the page folds away."""
    field.extra_dict = {**(field.extra_dict or {}), "advanced": True}
    return field


def sampler_fields() -> list[io.Input]:
    """Which sampler and scheduler, of those the host has."""
    return [
        io.Combo.Input("sampler_name", options=comfy.samplers.KSampler.SAMPLERS, default="euler", tooltip="The sampler you work with."),
        io.Combo.Input("scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="simple", tooltip="The scheduler you work with."),
    ]


def guidance_field() -> io.Input:
    return io.Float.Input("cfg", default=2.5, min=0.0, max=100.0, step=0.1, tooltip="The guidance you work with.")

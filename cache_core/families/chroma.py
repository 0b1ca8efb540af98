"""Chroma: FLUX's blocks without modulations of their own; one small network makes all shifts, scales and gates at once.

Source: comfy/ldm/chroma/model.py (ComfyUI 0.3.75). The order of joint tokens is text, image. The network (distilled_guidance_layer) runs
in every evaluation, also in skipped ones, over 344 vectors of which as many are used as there are shifts, scales and gates.
"""

from __future__ import annotations

from typing import Any

from .base import linear_weights
from .counting import around_macs
from .flux_blocks import flux_like, has_flux_blocks

_VECTORS = 344  # mod_index_length in the host
_around = around_macs({"img_in": "img", "txt_in": "txt", "final_layer.linear": "img"})


def modulation_macs(model: Any) -> float:
    """Multiply-adds of the network that makes the modulation, for one batch row."""
    return _VECTORS * linear_weights(model.distilled_guidance_layer)


CHROMA = flux_like(
    name="chroma",
    matches=lambda model: has_flux_blocks(model, "Chroma", own_modulation=False) and hasattr(model, "distilled_guidance_layer"),
    outside_macs=lambda model, lengths: _around(model, lengths) + modulation_macs(model),
)

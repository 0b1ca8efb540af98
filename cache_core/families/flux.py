"""FLUX.1: double blocks with separate image and text streams, then fused single blocks over both.

Source: comfy/ldm/flux/model.py (ComfyUI 0.3.75). The order of joint tokens is text, image; reference latents (Kontext) follow the
image inside the image stream. The host adds ControlNet residuals after each block.
"""

from __future__ import annotations

from .flux_blocks import flux_like, has_flux_blocks

FLUX = flux_like(
    name="flux",
    matches=lambda model: has_flux_blocks(model, "Flux", own_modulation=True),  # FLUX.2 has not
)

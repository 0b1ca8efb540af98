"""Hunyuan3D 2.0 (also mini and multi-view): FLUX's blocks over a set of latent vectors, without positions.

Source: comfy/ldm/hunyuan3d/model.py (ComfyUI 0.3.75). The order of joint tokens is text (a picture's features here), latents ("img"),
which lie as (B, C, L) in the host and as (B, L, C) from the embedding on. Hunyuan3D 2.1 is another network.
"""

from __future__ import annotations

from operator import attrgetter

from .counting import around_macs
from .flux import FLUX_AROUND
from .flux_blocks import flux_like, has_flux_blocks

HUNYUAN3D = flux_like(
    name="hunyuan3d",
    matches=lambda model: has_flux_blocks(model, "Hunyuan3Dv2", own_modulation=True) and hasattr(model, "latent_in"),
    outside_macs=around_macs({**FLUX_AROUND, "latent_in": "img", "cond_in": "txt"}),
    channels=attrgetter("latent_in.out_features"),
    embed="latent_in",
    input_channels=attrgetter("latent_in.in_features"),
)

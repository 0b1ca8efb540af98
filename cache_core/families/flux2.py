"""FLUX.2: the host's class Flux with modulation shared by all blocks, gated MLPs and no biases.

Source: comfy/ldm/flux/model.py (ComfyUI 0.3.75), global_modulation. Three modulations beside the blocks make the shifts, scales and
gates of all double and of all single blocks. The order of joint tokens is text (padded to 512 by the host), image; reference latents
follow the image inside the image stream.
"""

from __future__ import annotations

from .counting import around_macs
from .flux import FLUX_AROUND
from .flux_blocks import flux_like, has_flux_blocks

_SHARED = ("double_stream_modulation_img", "double_stream_modulation_txt", "single_stream_modulation")

FLUX2 = flux_like(
    name="flux2",
    matches=lambda model: has_flux_blocks(model, "Flux", own_modulation=False) and all(hasattr(model, name) for name in _SHARED),
    outside_macs=around_macs({**FLUX_AROUND, **dict.fromkeys(_SHARED, "")}),
)

"""Chroma Radiance: Chroma's transformer between other ends, for pixels in place of latents.

Source: comfy/ldm/chroma_radiance/model.py (ComfyUI 0.3.75); the class derives from Chroma. A convolution makes tokens of patches
(16 pixels wide). The head is the host's: small networks ("NeRF"), whose weights are made from each token's hidden state, turn the
patch's pixels into the result. They see the current pixels also in skipped evaluations. `img_in` is a method here, not a module.
"""

from __future__ import annotations

from typing import Any

from .base import Lengths, linear_weights
from .chroma import modulation_macs
from .counting import around_macs, patches
from .flux_blocks import flux_like, has_flux_blocks

_around = around_macs({"img_in_patch": "img", "txt_in": "txt"})


def _patch_channels(model: Any) -> int:
    return model.in_channels * model.patch_size**2


def _outside_macs(model: Any, lengths: Lengths) -> float:
    return _around(model, lengths) + modulation_macs(model) + _head_macs(model, lengths["img"])


def _head_macs(model: Any, tokens: int) -> float:
    """Per token the weights of its networks are made, per pixel they are used, each once."""
    generators = [block.param_generator for block in model.nerf_blocks]
    made = sum(generator.out_features for generator in generators)
    final = getattr(model, "nerf_final_layer_conv", None)
    head = linear_weights(model.nerf_final_layer) if final is None else 9 * final.conv.in_channels * final.conv.out_channels
    per_pixel = linear_weights(model.nerf_image_embedder) + made + head
    return tokens * (linear_weights(*generators) + model.patch_size**2 * per_pixel)


CHROMA_RADIANCE = flux_like(
    name="chroma_radiance",
    matches=lambda model: has_flux_blocks(model, "ChromaRadiance", own_modulation=False) and hasattr(model, "img_in_patch"),
    outside_macs=_outside_macs,
    embed="img_in_patch",
    input_channels=_patch_channels,
    tokens=patches,
)

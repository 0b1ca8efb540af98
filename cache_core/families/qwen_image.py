"""Qwen-Image and Qwen-Image-Edit: blocks with separate image and text streams.

Source: comfy/ldm/qwen_image/model.py (ComfyUI 0.3.75). A block returns text before image. The tokens of reference latents follow those of
the image. Hosts after 0.3.75 can modulate them as at time 0, without noise (timestep_zero_index); such calls are computed in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..refusals import UnsupportedCallError
from .shared.base import Cached, ModelFamily, Stack
from .shared.replaying import gated, stream_sites


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor, Tensor]:
    if arguments.get("timestep_zero_index") is not None:
        raise UnsupportedCallError("reference pictures have a modulation of their own (timestep_zero_index)")
    img_mods, txt_mods = (mod(arguments["temb"])[:, None].chunk(6, dim=-1) for mod in (block.img_mod, block.txt_mod))
    img = gated(cached, "img", arguments["hidden_states"], img_mods, block.img_norm2, block.img_mlp)
    return img, gated(cached, "txt", arguments["encoder_hidden_states"], txt_mods, block.txt_norm2, block.txt_mlp)


QWEN_IMAGE = ModelFamily(
    name="qwen_image",
    matches=lambda model: type(model).__name__ == "QwenImageTransformer2DModel" and hasattr(model, "transformer_blocks"),
    stacks=(
        Stack(
            path="transformer_blocks",
            parameters=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb", "image_rotary_emb"),
            streams={"hidden_states": "img", "encoder_hidden_states": "txt"},
            returns=("encoder_hidden_states", "hidden_states"),
            sites=(*stream_sites("img", "attn.to_out.0", "img_mlp"), *stream_sites("txt", "attn.to_add_out", "txt_mlp")),
            replay=_replay,
        ),
    ),
    embed="img_in",
)

"""Qwen-Image and Qwen-Image-Edit: blocks with separate image and text streams, joint attention over text, image.

Source: comfy/ldm/qwen_image/model.py (ComfyUI 0.3.75). A block returns text before image. Reference latents (Edit) follow the image inside
the image stream; the host cuts them off behind the head. Hosts after 0.3.75 can modulate them as if they were clean (timestep_zero_index).
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor

from .base import Cached, ModelFamily, Stack, UnsupportedCallError
from .counting import around_macs, blocks_macs
from .linears import StackLinears
from .replaying import gated, stream_sites

_LINEARS = (
    StackLinears(
        path="transformer_blocks",
        streams={"img_": "img", "txt_": "txt", "attn.add_": "txt", "attn.to_add_out": "txt", "attn.": "img"},
        skip=("img_mod.", "txt_mod."),
    ),
)


def _replay(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor, Tensor]:
    if call.get("timestep_zero_index") is not None:
        raise UnsupportedCallError("reference pictures modulated apart from the image")
    img_mods, txt_mods = (mod(call["temb"])[:, None].chunk(6, dim=-1) for mod in (block.img_mod, block.txt_mod))
    img = gated(cached, "img", call["hidden_states"], img_mods, block.img_norm2, block.img_mlp)
    return img, gated(cached, "txt", call["encoder_hidden_states"], txt_mods, block.txt_norm2, block.txt_mlp)


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
    hidden="img",
    channels=attrgetter("inner_dim"),
    embed="img_in",
    input_channels=attrgetter("in_channels"),
    macs=blocks_macs(
        _LINEARS,
        (("transformer_blocks", "txt+img", "txt+img"),),
        attrgetter("inner_dim"),
        chosen=("img_mlp.", "txt_mlp."),
        always=("img_mod.", "txt_mod."),
    ),
    outside_macs=around_macs({"img_in": "img", "txt_in": "txt", "time_text_embed": "", "norm_out": "", "proj_out": "img"}),
    linears=_LINEARS,
)

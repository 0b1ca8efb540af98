"""Qwen-Image and Qwen-Image-Edit: blocks with separate image and text streams, joint attention over text, image.

Source: comfy/ldm/qwen_image/model.py (ComfyUI 0.3.75). A block returns text before image. Reference latents (Edit) follow the image inside
the image stream; the host cuts them off behind the head.
"""

from __future__ import annotations

from operator import attrgetter

from .base import ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import StackLinears

_LINEARS = (
    StackLinears(
        path="transformer_blocks",
        streams={"img_": "img", "txt_": "txt", "attn.add_": "txt", "attn.to_add_out": "txt", "attn.": "img"},
        skip=("img_mod.", "txt_mod."),
    ),
)

QWEN_IMAGE = ModelFamily(
    name="qwen_image",
    matches=lambda model: type(model).__name__ == "QwenImageTransformer2DModel" and hasattr(model, "transformer_blocks"),
    stacks=(
        Stack(
            path="transformer_blocks",
            parameters=("hidden_states", "encoder_hidden_states", "encoder_hidden_states_mask", "temb", "image_rotary_emb"),
            streams={"hidden_states": "img", "encoder_hidden_states": "txt"},
            returns=("encoder_hidden_states", "hidden_states"),
        ),
    ),
    hidden="img",
    channels=attrgetter("inner_dim"),
    embed="img_in",
    input_channels=attrgetter("in_channels"),
    macs=blocks_macs(_LINEARS, (("transformer_blocks", "txt+img", "txt+img"),), attrgetter("inner_dim")),
    outside_macs=around_macs({"img_in": "img", "txt_in": "txt", "time_text_embed": "", "norm_out": "", "proj_out": "img"}),
    linears=_LINEARS,
)

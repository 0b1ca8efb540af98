"""LTX-Video: blocks of self-attention, cross-attention to text and feed-forward over one stream of video tokens.

Source: comfy/ldm/lightricks/model.py (ComfyUI 0.3.75). A block writes into its input and returns it. Key frames are frames of the latent
like any other; with them, or where a picture is continued, modulation is per token.
LTX-2 (LTXAVModel, video and audio together) is another structure.
"""

from __future__ import annotations

from operator import attrgetter

from .base import ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import StackLinears

_LINEARS = (StackLinears(path="transformer_blocks", streams={"attn2.to_k": "txt", "attn2.to_v": "txt", "": "img"}),)

LTXV = ModelFamily(
    name="ltxv",
    matches=lambda model: type(model).__name__ == "LTXVModel" and hasattr(model, "transformer_blocks"),
    stacks=(
        Stack(
            path="transformer_blocks",
            parameters=("x", "context", "attention_mask", "timestep", "pe", "transformer_options"),
            streams={"x": "img"},
            contexts={"context": "txt"},
            counts=lambda call, _lengths: {"modulations": call["timestep"].shape[1]},
        ),
    ),
    hidden="img",
    channels=attrgetter("inner_dim"),
    embed="patchify_proj",
    input_channels=attrgetter("patchify_proj.in_features"),
    macs=blocks_macs(_LINEARS, (("transformer_blocks", "img", "img"), ("transformer_blocks", "img", "txt")), attrgetter("inner_dim")),
    outside_macs=around_macs({"patchify_proj": "img", "caption_projection": "txt", "adaln_single": "modulations", "proj_out": "img"}),
    linears=_LINEARS,
)

"""Cosmos 1: blocks of self-attention, cross-attention to text and feed-forward; tokens lie in a grid (T, H, W, B, C), batch fourth.

Source: comfy/ldm/cosmos/model.py, blocks.py (ComfyUI 0.3.75). The host adds a position embedding to the stream, in place, before every
block; a skipped evaluation throws that away. Linear layers see the batch behind the tokens: calibrated evaluations do not know that form.
"""

from __future__ import annotations

from operator import attrgetter

from .base import ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import StackLinears

# of every block: 0 self-attention, 1 cross-attention, 2 feed-forward
_COUNTED = StackLinears(
    path="blocks",
    streams={"blocks.1.block.attn.to_k": "txt", "blocks.1.block.attn.to_v": "txt", "": "img"},
    skip=tuple(f"blocks.{i}.adaLN_modulation" for i in range(3)),
)

COSMOS = ModelFamily(
    name="cosmos",
    matches=lambda model: type(model).__name__ == "GeneralDIT" and getattr(model, "block_x_format", "") == "THWBD",
    stacks=(
        Stack(
            path="blocks",
            parameters=("x", "emb_B_D", "crossattn_emb", "crossattn_mask", "rope_emb_L_1_1_D", "adaln_lora_B_3D", "transformer_options"),
            streams={"x": "img"},
            counts=lambda call, _lengths: {"txt": call["crossattn_emb"].shape[0]},
            batch=3,
        ),
    ),
    hidden="img",
    channels=attrgetter("model_channels"),
    embed="x_embedder.proj.1",
    input_channels=attrgetter("x_embedder.proj.1.in_features"),
    tokens=lambda _layer, given: given.flatten(1, -2),
    macs=blocks_macs((_COUNTED,), (("blocks", "img", "img"), ("blocks", "img", "txt")), attrgetter("model_channels")),
    outside_macs=around_macs({"x_embedder": "img", "t_embedder": "", "final_layer.adaLN_modulation": "", "final_layer.linear": "img"}),
)

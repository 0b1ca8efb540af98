"""Cosmos-Predict2: blocks of self-attention, cross-attention to text and feed-forward; tokens lie in a grid (B, T, H, W, C).

Source: comfy/ldm/cosmos/predict2.py (ComfyUI 0.3.75). Attention flattens the grid, the feed-forward does not. Modulation is per frame, from
low-rank layers inside every block. The first layer gets the patches already, a constant padding channel among them.
"""

from __future__ import annotations

from operator import attrgetter

from .base import ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import StackLinears

_LINEARS = (
    StackLinears(path="blocks", streams={"cross_attn.k_proj": "txt", "cross_attn.v_proj": "txt", "": "img"}, skip=("adaln_modulation_",)),
)

COSMOS_PREDICT2 = ModelFamily(
    name="cosmos_predict2",
    matches=lambda model: type(model).__name__ == "MiniTrainDIT" and hasattr(model, "blocks"),
    stacks=(
        Stack(
            path="blocks",
            parameters=(
                "x_B_T_H_W_D", "emb_B_T_D", "crossattn_emb", "rope_emb_L_1_1_D", "adaln_lora_B_T_3D", "extra_per_block_pos_emb",
                "transformer_options",
            ),
            streams={"x_B_T_H_W_D": "img"},
            contexts={"crossattn_emb": "txt"},
        ),
    ),
    hidden="img",
    channels=attrgetter("model_channels"),
    embed="x_embedder.proj.1",
    input_channels=attrgetter("x_embedder.dim"),
    tokens=lambda _layer, given: given.flatten(1, -2),
    macs=blocks_macs(_LINEARS, (("blocks", "img", "img"), ("blocks", "img", "txt")), attrgetter("model_channels")),
    outside_macs=around_macs({"x_embedder": "img", "t_embedder": "", "final_layer.adaln_modulation": "", "final_layer.linear": "img"}),
    linears=_LINEARS,
)  # fmt: skip

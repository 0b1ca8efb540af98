"""Hunyuan3D 2.1: one stream of a time token and latents, pictures by cross-attention, long skips, routed experts in the last blocks.

Source: comfy/ldm/hunyuan3dv2_1/hunyuandit.py (ComfyUI 0.3.75). Another network than Hunyuan3D 2.0. Only its output is kept
(`whole_output.py`). Traps: the model swaps the two halves of its context, computes, and swaps the output back, so inside it a row belongs
to the other cond than at its ends; with one cond alone, at CFG 1 or where memory does not hold both, the host itself fails. Latents and
output lie as (B, C, L). The final layer knows no noise level, so an output repeats exactly what its hidden state would.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

from ..kinds import Kind
from .base import Lengths, linear_weights
from .counting import around_macs, blocks_macs
from .linears import StackLinears
from .whole_output import whole_output

_JOINT = "time+img"
_BLOCKS = blocks_macs(
    (StackLinears("blocks", {"attn2.to_k": "txt", "attn2.to_v": "txt", "": _JOINT}, skip=("moe.experts.",)),),
    (("blocks", _JOINT, _JOINT), ("blocks", _JOINT, "txt")),
    attrgetter("hidden_size"),
)
_AROUND = around_macs({"x_embedder": "img", "t_embedder": "", "final_layer.linear": "img"})


def _is_hunyuan3d_2_1(model: nn.Module) -> bool:
    if type(model).__name__ != "HunYuanDiTPlain" or not len(getattr(model, "blocks", ())):
        return False
    own = all(hasattr(model, name) for name in ("x_embedder", "t_embedder", "final_layer", "out_channels"))
    return own and all(hasattr(model.blocks[0], name) for name in ("attn1", "attn2", "skip_linear", "use_moe"))  # type: ignore[index]


def _expert_macs(block: Any, tokens: int) -> float:
    """What the router and its choice of experts cost more than the once that every expert was counted."""
    if not block.use_moe:
        return 0.0
    moe = block.moe
    return tokens * (moe.moe_top_k * linear_weights(moe.experts[0]) + moe.gate.weight.numel()) - linear_weights(moe.experts)


def _macs(model: Any, lengths: Lengths) -> float:
    tokens = lengths["time"] + lengths["img"]
    experts = sum(_expert_macs(block, tokens) for block in model.blocks)
    return _BLOCKS(model, lengths, Kind.FULL, 1.0) + experts + _AROUND(model, lengths)


HUNYUAN3D_2_1 = whole_output(
    name="hunyuan3d_2_1",
    matches=_is_hunyuan3d_2_1,
    channels=attrgetter("out_channels"),
    macs=_macs,
    counts=lambda _call, _lengths: {"time": 1},
)

"""Cosmos 1: blocks of self-attention, cross-attention to text and feed-forward; tokens lie in a grid (T, H, W, B, C), batch fourth.

Source: comfy/ldm/cosmos/model.py, blocks.py (ComfyUI 0.3.75). Each of the three is x += gate·f(norm(x)·(1 + scale) + shift). The host
adds a position embedding to the stream, in place, before every block; a skipped evaluation throws that away. Linear layers
see the batch behind the tokens too, of attention (L, B, C).
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor

from .base import Cached, ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import StackLinears
from .replaying import renewed
from .video_blocks import CROSS, MLP, SELF, sites

# of every block: 0 self-attention, 1 cross-attention, 2 feed-forward
_MODULATIONS = tuple(f"blocks.{i}.adaLN_modulation" for i in range(3))
_LINEARS = StackLinears(
    path="blocks",
    streams={"blocks.1.block.attn.to_k": "txt", "blocks.1.block.attn.to_v": "txt", "": "img"},
    skip=_MODULATIONS,
    batch=-2,
)


def _replay(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    x = _STACK.flat(call["x"])
    tokens = cached.choose("img", x.shape[1])
    _, cross, feed = parts = block.blocks
    (_, _, gate_self), of_cross, of_feed = (_vectors(part, call) for part in parts)

    def look(at: Tensor) -> Tensor:
        """Its attention wants the batch behind the tokens."""
        asking = _modulated(cross, of_cross, x[:, at]).transpose(0, 1)
        options = call.get("transformer_options", {})
        return cross.block.attn(asking, call["crossattn_emb"], call.get("crossattn_mask"), transformer_options=options).transpose(0, 1)

    x = x + gate_self * cached.whole(SELF)
    x = x + of_cross[2] * renewed(cached, CROSS, tokens, look)
    x = x + of_feed[2] * renewed(cached, MLP, tokens, lambda at: feed.block(_modulated(feed, of_feed, x[:, at])))
    return (_STACK.grid(x, call["x"]),)


def _vectors(part: Any, call: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Shift, scale and gate (B, 1, C) of a sublayer."""
    vectors = part.adaLN_modulation(call["emb_B_D"])
    return (vectors + call["adaln_lora_B_3D"] if part.use_adaln_lora else vectors).unsqueeze(1).chunk(3, dim=-1)


def _modulated(part: Any, vectors: tuple[Tensor, ...], x: Tensor) -> Tensor:
    return part.norm_state(x) * (1 + vectors[1]) + vectors[0]


_STACK = Stack(
    path="blocks",
    parameters=("x", "emb_B_D", "crossattn_emb", "crossattn_mask", "rope_emb_L_1_1_D", "adaln_lora_B_3D", "transformer_options"),
    streams={"x": "img"},
    counts=lambda call, _lengths: {"txt": call["crossattn_emb"].shape[0]},
    batch=3,
    sites=sites(*(f"blocks.{i}.block" for i in range(3))),
    replay=_replay,
)

COSMOS = ModelFamily(
    name="cosmos",
    matches=lambda model: type(model).__name__ == "GeneralDIT" and getattr(model, "block_x_format", "") == "THWBD",
    stacks=(_STACK,),
    hidden="img",
    channels=attrgetter("model_channels"),
    embed="x_embedder.proj.1",
    input_channels=attrgetter("x_embedder.proj.1.in_features"),
    tokens=lambda _layer, given: given.flatten(1, -2),
    macs=blocks_macs(
        (_LINEARS,),
        (("blocks", "img", "img"), ("blocks", "img", "txt")),
        attrgetter("model_channels"),
        chosen=("blocks.1.block", "blocks.2.block"),
        always=_MODULATIONS,
    ),
    outside_macs=around_macs({"x_embedder": "img", "t_embedder": "", "final_layer.adaLN_modulation": "", "final_layer.linear": "img"}),
    linears=(_LINEARS,),
)

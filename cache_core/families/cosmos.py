"""Cosmos 1: blocks of self-attention, cross-attention to text and MLP over tokens in a grid (T, H, W, B, C), with the batch fourth.

Source: comfy/ldm/cosmos/model.py, blocks.py (ComfyUI 0.3.75). Each of the three sublayers f computes x += gate·f(norm(x)·(1 + scale) +
shift). The host adds a position embedding to the stream, in place, before every block. Attention layers take tokens as (L, B, C).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from .shared.base import Cached, ModelFamily, Stack
from .shared.replaying import renewed
from .shared.video_blocks import CROSS, MLP, SELF, in_grid, sites


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    x = _STACK.flat(arguments["x"])
    tokens = cached.choose("img", x.shape[1])
    _, cross, feed = parts = block.blocks  # self-attention, cross-attention, feed-forward
    (_, _, gate_self), of_cross, of_feed = (_vectors(part, arguments) for part in parts)

    def look(at: Tensor) -> Tensor:
        """Cross-attention of the chosen tokens, whose layer takes the batch as the second axis."""
        asking = rearrange(_modulated(cross, of_cross, x[:, at]), "B k C -> k B C")
        mask, options = arguments.get("crossattn_mask"), arguments.get("transformer_options", {})
        answer = cross.block.attn(asking, arguments["crossattn_emb"], mask, transformer_options=options)
        return rearrange(answer, "k B C -> B k C")

    x = x + gate_self * cached.all_tokens(SELF)
    x = x + of_cross[2] * renewed(cached, CROSS, tokens, look)
    x = x + of_feed[2] * renewed(cached, MLP, tokens, lambda at: feed.block(_modulated(feed, of_feed, x[:, at])))
    return (in_grid(x, arguments["x"], _STACK.batch),)


def _vectors(part: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Returns shift, scale and gate of a sublayer, each (B, 1, C)."""
    vectors = part.adaLN_modulation(arguments["emb_B_D"])
    return (vectors + arguments["adaln_lora_B_3D"] if part.use_adaln_lora else vectors).unsqueeze(1).chunk(3, dim=-1)


def _modulated(part: Any, vectors: tuple[Tensor, ...], x: Tensor) -> Tensor:
    return part.norm_state(x) * (1 + vectors[1]) + vectors[0]


_STACK = Stack(
    path="blocks",
    parameters=("x", "emb_B_D", "crossattn_emb", "crossattn_mask", "rope_emb_L_1_1_D", "adaln_lora_B_3D", "transformer_options"),
    streams={"x": "img"},
    batch=3,
    sites=sites(*(f"blocks.{i}.block" for i in range(3))),
    replay=_replay,
)

COSMOS = ModelFamily(
    name="cosmos",
    matches=lambda model: type(model).__name__ == "GeneralDIT" and getattr(model, "block_x_format", "") == "THWBD",
    stacks=(_STACK,),
    embed="x_embedder.proj.1",
    tokens=lambda _layer, given: rearrange(given, "B ... C -> B (...) C"),
)

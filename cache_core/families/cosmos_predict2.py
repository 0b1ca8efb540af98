"""Cosmos-Predict2: blocks of self-attention, cross-attention to text and MLP, over tokens in a grid (B, T, H, W, C).

Source: comfy/ldm/cosmos/predict2.py (ComfyUI 0.3.75). Each of the three sublayers f computes x += gate·f(norm(x)·(1 + scale) + shift).
Attention flattens the grid, the MLP does not. Modulation is per frame and comes from low-rank layers inside every block. In newer hosts
the stream may be float32 while sublayers compute in the dtype of the modulation. The layer that embeds the input is given patches, which
include a constant padding channel.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from .shared.base import Cached, ModelFamily, Stack
from .shared.replaying import renewed
from .shared.video_blocks import CROSS, MLP, SELF, in_grid, sites, spread


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    given, position = arguments["x_B_T_H_W_D"], arguments.get("extra_per_block_pos_emb")
    x = _STACK.flat(given if position is None else given + position)
    tokens = cached.choose("img", x.shape[1])
    of_self, of_cross, of_mlp = (_vectors(block, name, arguments) for name in ("self_attn", "cross_attn", "mlp"))

    def look(at: Tensor) -> Tensor:
        asking = _modulated(block.layer_norm_cross_attn, of_cross, x, at)
        return block.cross_attn(asking, arguments["crossattn_emb"], transformer_options=arguments.get("transformer_options", {}))

    def gated(vectors: tuple[Tensor, ...], sublayer: Tensor) -> Tensor:
        return spread(vectors[2], x.shape[1]).to(x.dtype) * sublayer

    x = x + gated(of_self, cached.all_tokens(SELF))
    x = x + gated(of_cross, renewed(cached, CROSS, tokens, look))
    x = x + gated(of_mlp, renewed(cached, MLP, tokens, lambda at: block.mlp(_modulated(block.layer_norm_mlp, of_mlp, x, at))))
    return (in_grid(x, given),)


def _vectors(block: Any, name: str, arguments: Mapping[str, Any]) -> tuple[Tensor, ...]:
    """Returns shift, scale and gate of a sublayer, each (B, T, C) or (B, 1, C)."""
    vectors = getattr(block, f"adaln_modulation_{name}")(arguments["emb_B_T_D"])
    return (vectors + arguments["adaln_lora_B_T_3D"] if block.use_adaln_lora else vectors).chunk(3, dim=-1)


def _modulated(norm: Any, vectors: tuple[Tensor, ...], x: Tensor, at: Tensor) -> Tensor:
    shift, scale, _ = (spread(vector, x.shape[1], at) for vector in vectors)
    return (norm(x[:, at]) * (1 + scale) + shift).to(vectors[0].dtype)


_STACK = Stack(
    path="blocks",
    parameters=(
        "x_B_T_H_W_D", "emb_B_T_D", "crossattn_emb", "rope_emb_L_1_1_D", "adaln_lora_B_T_3D", "extra_per_block_pos_emb",
        "transformer_options",
    ),
    streams={"x_B_T_H_W_D": "img"},
    sites=sites("self_attn", "cross_attn", "mlp"),
    replay=_replay,
)  # fmt: skip

COSMOS_PREDICT2 = ModelFamily(
    name="cosmos_predict2",
    matches=lambda model: type(model).__name__ == "MiniTrainDIT" and hasattr(model, "blocks"),
    stacks=(_STACK,),
    embed="x_embedder.proj.1",
    tokens=lambda _layer, given: rearrange(given, "B ... C -> B (...) C"),
)

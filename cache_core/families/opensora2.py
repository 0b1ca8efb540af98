"""Open-Sora 2 (MMDiTModel): FLUX's double and single blocks over packed video and text.

The host has no such class. This family was written from opensora/models/mmdit/model.py and layers.py of hpcaitech/Open-Sora, and is tested
on a stand-in, a small network of that structure. A network is recognised by the attributes used here and by the class names of its blocks'
processors, which do the work of `forward`; one with other processors (sequence parallelism) is not taken for this one. It differs from
FLUX in two ways:

- q, k and v may have layers of their own (`fused_qkv` false, as in the released checkpoint). A single block then computes q_proj, k_proj
  and v_mlp (v and the MLP's input side by side) instead of linear1.
- `cond_in` adds the tokens of a given picture to the embedded tokens.

Text and video are joined in this order.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import unwrapped
from .shared.base import Cached, modulate
from .shared.flux_blocks import flux_like, has_flux_blocks
from .shared.fused import LinearPart
from .shared.replaying import renewed

_JOINT = "txt+img"


def _is_mmdit(model: nn.Module) -> bool:
    """Recognises the network under any class name: FLUX's own blocks have no processors."""
    if not has_flux_blocks(model, type(model).__name__, own_modulation=True) or not hasattr(model, "cond_in"):
        return False
    double, single = ([unwrapped(block) for block in blocks] for blocks in (model.double_blocks, model.single_blocks))  # type: ignore[union-attr]
    has_projections = all(hasattr(block, "linear1") or hasattr(block, "v_mlp") for block in single)
    return (
        has_projections and _processors(double) == {"DoubleStreamBlockProcessor"} and _processors(single) == {"SingleStreamBlockProcessor"}
    )


def _processors(blocks: list[nn.Module]) -> set[str]:
    return {type(getattr(block, "processor", None)).__name__ for block in blocks}


def _v_and_mlp(block: Any) -> tuple[LinearPart, ...]:
    return LinearPart("v", slice(0, block.hidden_size)), LinearPart("mlp", slice(block.hidden_size, None))


_FLUX = flux_like(name="opensora2", matches=_is_mmdit, joint=_JOINT)


def _replay_single(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor, ...]:
    """Recomputes linear2 for the chosen tokens, from their attention in the cache and their recomputed MLP half."""
    if hasattr(block, "linear1"):
        fused = _FLUX.stacks[1].replay
        assert fused is not None, "FLUX's blocks have a conservative form"
        return fused(block, arguments, cached)
    x, mod = arguments["x"], block.modulation(arguments["vec"])[0]
    tokens = cached.choose(_JOINT, x.shape[1])

    def fresh(at: Tensor) -> Tensor:
        projected = block.v_mlp(modulate(block.pre_norm(x[:, at]), mod.shift, mod.scale))  # v of the chosen tokens is dropped
        mlp = block.mlp_act(projected[..., block.hidden_size :])
        return block.linear2(torch.cat((cached.some_tokens(f"{_JOINT}.attn", at), mlp), dim=-1))

    return (x + mod.gate * renewed(cached, f"{_JOINT}.output", tokens, fresh),)


OPENSORA2 = replace(
    _FLUX,
    stacks=(_FLUX.stacks[0], replace(_FLUX.stacks[1], replay=_replay_single)),
    fused={**_FLUX.fused, "single_blocks": {**_FLUX.fused["single_blocks"], "v_mlp": _v_and_mlp}},
)

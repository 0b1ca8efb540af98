"""Open-Sora 2 (MMDiTModel): FLUX's double and single blocks, over packed video and text.

Stand-in: the host has no such class. Written from opensora/models/mmdit/model.py and layers.py of hpcaitech/Open-Sora and tested on a small
model of that structure; a model is known by what is used here and by the names of its blocks' processors, which do the work of `forward`:
with others (sequence parallelism) it is left alone. What FLUX's own blocks have not: q, k and v in layers of their own (`fused_qkv` false,
as in the released checkpoint), where a single block computes q_proj, k_proj and v_mlp (v and the MLP's input side by side) instead of
linear1; and `cond_in`, which adds the given picture's tokens to the embedded ones. The order of joint tokens is text, video.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from .base import Cached, modulate
from .flux_blocks import flux_like, has_flux_blocks
from .fused import LinearPart
from .replaying import renewed

_JOINT = "txt+img"


def _is_mmdit(model: nn.Module) -> bool:
    """Whatever its class is called: FLUX's own blocks have no processors."""
    if not has_flux_blocks(model, type(model).__name__, own_modulation=True) or not hasattr(model, "cond_in"):
        return False
    double, single = ([getattr(block, "_orig_mod", block) for block in blocks] for blocks in (model.double_blocks, model.single_blocks))  # type: ignore[union-attr]
    has_projections = all(hasattr(block, "linear1") or hasattr(block, "v_mlp") for block in single)
    return (
        has_projections and _processors(double) == {"DoubleStreamBlockProcessor"} and _processors(single) == {"SingleStreamBlockProcessor"}
    )


def _processors(blocks: list[nn.Module]) -> set[str]:
    return {type(getattr(block, "processor", None)).__name__ for block in blocks}


def _v_and_mlp(block: Any) -> tuple[LinearPart, ...]:
    return LinearPart("v", slice(0, block.hidden_size)), LinearPart("mlp", slice(block.hidden_size, None))


_FLUX = flux_like(name="opensora2", matches=_is_mmdit, joint=_JOINT)


def _replay_single(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor, ...]:
    """Kept attention beside the MLP half of the chosen tokens."""
    if hasattr(block, "linear1"):
        fused = _FLUX.stacks[1].replay
        assert fused is not None, "FLUX's blocks have a conservative form"
        return fused(block, call, cached)
    x, mod = call["x"], block.modulation(call["vec"])[0]
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

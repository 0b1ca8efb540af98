"""Open-Sora 1.2 (STDiT3): spatial and temporal blocks in alternation over one stream of video tokens, text by cross-attention.

The host has no such class. This family was written from opensora/models/stdit/stdit3.py and models/layers/blocks.py of
hpcaitech/Open-Sora, and is tested on a stand-in, a small network of that structure. A network is recognised by the attributes used here
and by the parameters of its blocks' `forward`, so a variant with others is not taken for this one.

Tokens are (B, T·S, C), frame by frame. A block computes x += gate·attn, x += cross_attn (no gate), x += gate·mlp. Shifts, scales and gates
are the block's scale_shift_table plus one projection of the time that all blocks share. Three things are unusual:

- Self-attention is given groups of tokens: (B·T, S, C) in a spatial block, (B·S, T, C) in a temporal one.
- Frames that are given (False in x_mask) are modulated with t0, as at time 0.
- The texts of all batch rows come without padding in one row, (1, sum of y_lens, C). So the layer that projects the text is left to the
  host in incremental evaluations; its output is the same at every step anyway.

DuCa as published for this model (force_scheduler.py and cal_type.py of its code) has cycles of 3 steps for self-attention and MLP but of 6
for cross-attention. So every other full evaluation and all conservative ones take cross-attention from the cache, and the MLP alone is
refreshed for chosen tokens. There the first three steps are exact; here every full evaluation that follows a full one is. The n-th spatial
and the n-th temporal block choose the same tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from ..blocks import unwrapped
from ..refusals import UnsupportedCallError
from .shared.as_read import takes
from .shared.base import Cached, ModelFamily, Site, Stack
from .shared.fused import equal_parts
from .shared.patches import patches
from .shared.replaying import renewed
from .shared.video_blocks import CROSS, MLP, SELF

_PARAMETERS = ("x", "y", "t", "mask", "x_mask", "t0", "T", "S")
_LISTS = ("spatial_blocks", "temporal_blocks")
_USED = attrgetter(
    "attn.qkv",
    "attn.proj",
    "cross_attn.q_linear",
    "cross_attn.kv_linear",
    "cross_attn.proj",
    "mlp",
    "norm2",
    "scale_shift_table",
    "temporal",
)


def _is_stdit3(model: nn.Module) -> bool:
    spatial, temporal = (getattr(model, path, None) for path in _LISTS)
    if not (isinstance(spatial, nn.ModuleList) and isinstance(temporal, nn.ModuleList) and 0 < len(spatial) == len(temporal)):
        return False
    has_patches = isinstance(getattr(getattr(model, "x_embedder", None), "proj", None), nn.Conv3d)
    return has_patches and not any(_is_other(block, is_temporal=False) for block in spatial) and not any(map(_is_other, temporal))


def _is_other(block: nn.Module, is_temporal: bool = True) -> bool:
    """Returns whether a block differs from the spatial or temporal block that this file describes."""
    block = unwrapped(block)
    try:
        *_, table, temporal = _USED(block)
    except AttributeError:
        return True
    return table.shape[:1] != (6,) or bool(temporal) != is_temporal or not takes(block, *_PARAMETERS)


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    """Takes both attentions from the cache and recomputes the MLP for the chosen tokens."""
    x = arguments["x"]
    rows, length, _ = x.shape
    gate_attn, shift, scale, gate_mlp = _modulation(block, arguments)
    x = x + gate_attn * _in_order(block, cached.all_tokens(SELF), rows, arguments)
    x = x + cached.all_tokens(CROSS)
    tokens = cached.choose("img", length)

    def feed_forward(at: Tensor) -> Tensor:
        return block.mlp(block.norm2(x[:, at]) * (1 + _of(scale, at)) + _of(shift, at))

    return (x + gate_mlp * renewed(cached, MLP, tokens, feed_forward),)


def _in_order(block: Any, attended: Tensor, rows: int, arguments: Mapping[str, Any]) -> Tensor:
    """Returns a self-attention output (B·T, S, C), or (B·S, T, C) of a temporal block, as (B, T·S, C)."""
    pattern = "(B S) T C -> B (T S) C" if block.temporal else "(B T) S C -> B (T S) C"
    return rearrange(attended, pattern, B=rows)


def _modulation(block: Any, arguments: Mapping[str, Any]) -> list[Tensor]:
    """Returns the gate of self-attention, then shift, scale and gate of the MLP: (B, 1, C), or (B, T·S, C) where frames are given."""
    given, x_mask = [], arguments.get("x_mask")
    for time in (arguments["t"],) if x_mask is None else (arguments["t"], arguments["t0"]):
        vectors = block.scale_shift_table[None] + rearrange(time, "B (six C) -> B six C", six=6)
        given.append(vectors.chunk(6, dim=1)[2:])
    if x_mask is None:
        return list(given[0])
    if x_mask.shape[-1] * arguments["S"] != arguments["x"].shape[1]:
        raise UnsupportedCallError("the frame mask and the tokens have different numbers of frames")
    is_sampled = x_mask.repeat_interleave(arguments["S"], dim=1)[..., None]
    return [torch.where(is_sampled, now, at_zero) for now, at_zero in zip(*given)]


def _of(vectors: Tensor, tokens: Tensor) -> Tensor:
    """Returns the vectors that the chosen tokens take, from (B, L, C), or (B, 1, C) where all tokens take the same."""
    return vectors if vectors.shape[1] == 1 else vectors[:, tokens]


def _stack(path: str) -> Stack:
    return Stack(
        path=path,
        parameters=_PARAMETERS,
        streams={"x": "img"},
        sites=(Site("self_attn", "attn", "img"), Site("cross_attn", "cross_attn", "img", every=2), Site("mlp", "mlp", "img")),
        replay=_replay,
    )


OPENSORA = ModelFamily(
    name="opensora",
    matches=_is_stdit3,
    stacks=tuple(_stack(path) for path in _LISTS),
    embed="x_embedder.proj",
    tokens=patches,
    fused=dict.fromkeys(_LISTS, equal_parts("attn.qkv", "qkv")),
)

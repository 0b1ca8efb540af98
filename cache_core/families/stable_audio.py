"""Stable Audio: blocks of self-attention, cross-attention to text and MLP over audio frames; those of Stable Audio 3 have gates.

Source: comfy/ldm/audio/dit.py (ComfyUI 0.3.75; 0.33.0 for Stable Audio 3). The input layer is given frames alone. After it the host puts
more tokens before the frames, anew in every evaluation, and after the blocks it cuts them off; so they are named as a stream of their own
("time"). They hold time and global conditioning. In Stable Audio 3 those come as scale, shift and gate instead, and the tokens are
memory tokens. Blocks of Stable Audio 3 also add a projection of a mask and a latent that come with the frames and do not change while
sampling. They may subtract a second attention from the first (differential); their layers then make more projections.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..refusals import UnsupportedCallError
from .shared.base import Cached, ModelFamily, Site, Stack
from .shared.fused import LinearPart, equal_parts
from .shared.replaying import renewed

_PATH, _FRAMES = "transformer.layers", "time+audio"
_ONCE: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"self_attn.to_qkv": ("q", "k", "v"), "cross_attn.to_q": ("all",), "cross_attn.to_kv": ("k", "v")}
)
_AGAIN: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"self_attn.to_qkv": ("q", "k", "v", "q2", "k2"), "cross_attn.to_q": ("q", "q2"), "cross_attn.to_kv": ("k", "k2", "v")}
)


def _is_differential(block: Any) -> bool:
    return bool(getattr(block.self_attn, "differential", False))


def _projections(layer: str, block: Any) -> tuple[LinearPart, ...]:
    return equal_parts(layer, (_AGAIN if _is_differential(block) else _ONCE)[layer])[layer](block)


_FUSED = MappingProxyType({layer: partial(_projections, layer) for layer in _ONCE} | equal_parts("ff.ff.0.proj", "vg"))


def _modulation(block: Any, arguments: Mapping[str, Any]) -> tuple[Tensor, ...] | None:
    """Returns scale, shift and gate, each (B, 1, C), of self-attention, then those of the MLP; None where there is no modulation."""
    given = arguments.get("global_cond")
    if given is None:
        return None
    if not getattr(block, "global_cond_shared_embed", False):
        raise UnsupportedCallError("blocks that compute their own gates cannot be replayed")
    return tuple((block.to_scale_shift_gate.to(given) + given).unsqueeze(1).chunk(6, dim=-1))


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    """Takes self-attention from the cache and recomputes cross-attention and MLP for the chosen tokens."""
    if arguments.get("mask") is not None or block.conformer is not None or getattr(block.cross_attn, "feat_scale", False):
        raise UnsupportedCallError("blocks that mask frames, convolve over them or average them cannot be replayed")
    text, options, modulation = arguments["context"], arguments.get("transformer_options", {}), _modulation(block, arguments)
    attention = cached.all_tokens(f"{_FRAMES}.self_attn")
    x = attended = arguments["x"] + (attention if modulation is None else attention * (1 - modulation[2]).sigmoid())
    tokens = cached.choose(_FRAMES, x.shape[1])

    def look(at: Tensor) -> Tensor:
        return block.cross_attn(block.cross_attend_norm(attended[:, at]), context=text, transformer_options=options)

    if text is not None:
        x = x + renewed(cached, f"{_FRAMES}.cross_attn", tokens, look)
    if arguments.get("local_add_cond") is not None and getattr(block, "to_local_embed", None) is not None:
        beside = cached.all_tokens("audio.local")
        x = x + F.pad(beside, (0, 0, x.shape[1] - beside.shape[1], 0))

    def feed(at: Tensor) -> Tensor:
        normed = block.ff_norm(x[:, at])
        return block.ff(normed if modulation is None else normed * (1 + modulation[3]) + modulation[4])

    fed = renewed(cached, f"{_FRAMES}.mlp", tokens, feed)
    return (x + (fed if modulation is None else fed * (1 - modulation[5]).sigmoid()),)


STABLE_AUDIO = ModelFamily(
    name="stable_audio",
    matches=lambda model: type(model).__name__ == "AudioDiffusionTransformer" and hasattr(model, "transformer"),
    stacks=(
        Stack(
            path=_PATH,
            parameters=("x", "context", "global_cond", "mask", "context_mask", "rotary_pos_emb", "transformer_options"),
            streams={"x": _FRAMES},
            sites=(
                Site("self_attn", "self_attn", _FRAMES),
                Site("cross_attn", "cross_attn", _FRAMES),
                Site("local", "to_local_embed", "audio"),
                Site("mlp", "ff", _FRAMES),
            ),
            replay=_replay,
        ),
    ),
    hidden="audio",
    embed="transformer.project_in",
    fused={_PATH: _FUSED},
)

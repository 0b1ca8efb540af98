"""What conservative evaluations of several image families share (DuCa, arXiv 2412.18911): attention kept, the MLP of chosen tokens new."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Cached, Site, modulate

Layer = Callable[[Tensor], Tensor]


def stream_sites(stream: str, attention: str, mlp: str) -> tuple[Site, Site]:
    """What `gated` and `sandwiched` need of a stream. attention, mlp: paths of the modules that end these sublayers."""
    return Site("attn", attention, stream), Site("mlp", mlp, stream)


def renewed(cached: Cached, key: str, tokens: Tensor | None, sublayer: Layer) -> Tensor:
    """A sublayer's results (B, L, C): those kept, but of `tokens` (k,) what `sublayer` makes of these indices."""
    return cached.all_tokens(key) if tokens is None else cached.refreshed(key, tokens, sublayer(tokens))


def gated(cached: Cached, stream: str, x: Tensor, modulation: Sequence[Tensor], norm: Layer, mlp: Layer) -> Tensor:
    """x + gate·attn, then + gate·mlp(norm(x)·(1 + scale) + shift).

    x (B, L, C). modulation: shift, scale and gate (B, 1, C) of the attention, then of the MLP.
    """
    _, _, gate_attn, shift, scale, gate_mlp = modulation
    x = x + gate_attn * cached.all_tokens(f"{stream}.attn")
    tokens = cached.choose(stream, x.shape[1])
    return x + gate_mlp * renewed(cached, f"{stream}.mlp", tokens, lambda at: mlp(modulate(norm(x[:, at]), shift, scale)))


def sandwiched(cached: Cached, stream: str, x: Tensor, modulation: Sequence[Tensor], block: Any, norm: Layer) -> Tensor:
    """x + tanh(gate)·norm(attn), then the same of the feed-forward, which has norms on both sides: Lumina's blocks and those like them.

    x (B, L, C). modulation: scale and gate (B, 1, C) of the attention, then of the feed-forward. norm: of the attention's result. What is
    kept comes before these norms, as newer hosts run norm and gate in one kernel and do not call the module.
    """
    _, gate_attn, scale, gate_mlp = modulation
    x = x + gate_attn.tanh() * norm(finite(cached.all_tokens(f"{stream}.attn")))
    tokens = cached.choose(stream, x.shape[1])
    mlp = renewed(cached, f"{stream}.mlp", tokens, lambda at: block.feed_forward(block.ffn_norm1(x[:, at]) * (1 + scale)))
    return x + gate_mlp.tanh() * block.ffn_norm2(finite(mlp))


def finite(x: Tensor) -> Tensor:
    """float16 can overflow in deep blocks; hosts clip there too."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x

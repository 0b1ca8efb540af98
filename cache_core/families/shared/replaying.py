"""Arithmetic that several families share in replays (DuCa, arXiv 2412.18911): attention from the cache, the MLP for chosen tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Cached, Site, modulate

Layer = Callable[[Tensor], Tensor]


def stream_sites(stream: str, attention: str, mlp: str) -> tuple[Site, Site]:
    """Returns the sites whose outputs `gated` and `sandwiched` use.

    Args:
        stream: Name of the stream.
        attention: Path of the last module of the attention sublayer.
        mlp: Path of the last module of the MLP.
    """
    return Site("attn", attention, stream), Site("mlp", mlp, stream)


def renewed(cached: Cached, key: str, tokens: Tensor | None, sublayer: Layer) -> Tensor:
    """Returns a sublayer's outputs (B, L, C) from the cache, after recomputing those of the chosen tokens.

    Args:
        cached: The kept outputs of the block.
        key: Key of the sublayer's site.
        tokens: Indices of the chosen tokens (k,), None for none.
        sublayer: Returns the sublayer's outputs (B, k, C) for such indices.
    """
    return cached.all_tokens(key) if tokens is None else cached.refreshed(key, tokens, sublayer(tokens))


def gated(cached: Cached, stream: str, x: Tensor, modulation: Sequence[Tensor], norm: Layer, mlp: Layer) -> Tensor:
    """Replays one stream of a block that computes x += gate·attn, then x += gate·mlp(norm(x)·(1 + scale) + shift).

    Args:
        cached: The kept outputs of the block.
        stream: Name of the stream.
        x: Its tokens (B, L, C).
        modulation: Shift, scale and gate, each (B, 1, C), of the attention, then those of the MLP.
        norm: The norm before the MLP.
        mlp: The MLP.
    """
    _, _, gate_attn, shift, scale, gate_mlp = modulation
    x = x + gate_attn * cached.all_tokens(f"{stream}.attn")
    tokens = cached.choose(stream, x.shape[1])
    return x + gate_mlp * renewed(cached, f"{stream}.mlp", tokens, lambda at: mlp(modulate(norm(x[:, at]), shift, scale)))


def sandwiched(cached: Cached, stream: str, x: Tensor, modulation: Sequence[Tensor], block: Any, norm: Layer) -> Tensor:
    """Replays a block of Lumina's form: x += tanh(gate)·norm(attn), then the same with the MLP, which has a norm on both sides.

    The kept outputs are those before these norms, as newer hosts run norm and gate in one kernel and do not call the norm's module.

    Args:
        cached: The kept outputs of the block.
        stream: Name of the stream.
        x: Its tokens (B, L, C).
        modulation: Scale and gate, each (B, 1, C), of the attention, then those of the MLP.
        block: The block, whose `ffn_norm1`, `feed_forward` and `ffn_norm2` are run.
        norm: The norm after the attention.
    """
    _, gate_attn, scale, gate_mlp = modulation
    x = x + gate_attn.tanh() * norm(finite(cached.all_tokens(f"{stream}.attn")))
    tokens = cached.choose(stream, x.shape[1])
    mlp = renewed(cached, f"{stream}.mlp", tokens, lambda at: block.feed_forward(block.ffn_norm1(x[:, at]) * (1 + scale)))
    return x + gate_mlp.tanh() * block.ffn_norm2(finite(mlp))


def finite(x: Tensor) -> Tensor:
    """Clips what overflowed in float16, as hosts do in deep blocks; returns tensors of other dtypes as they are."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x

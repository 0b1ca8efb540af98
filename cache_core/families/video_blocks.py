"""What conservative evaluations of video blocks share: the three sublayers that most have, and modulation by runs of tokens."""

from __future__ import annotations

from torch import Tensor

from .base import Site

# Keys of what is kept: self-attention answers from the cache, the other two are renewed for the chosen tokens.
SELF, CROSS, MLP = "img.self_attn", "img.cross_attn", "img.mlp"


def sites(self_attention: str, cross_attention: str, feed_forward: str) -> tuple[Site, Site, Site]:
    """Of blocks of these three modules over one stream."""
    return Site("self_attn", self_attention, "img"), Site("cross_attn", cross_attention, "img"), Site("mlp", feed_forward, "img")


def spread(vectors: Tensor, length: int, tokens: Tensor | None = None) -> Tensor:
    """Vectors (B, G, C) as each of `length` tokens takes them, or the chosen ones: (B, L or k, C), or (B, 1, C) where G is 1.

    A vector serves a run of tokens, a frame in most models. Where the runs do not come out even, the last one is cut short.
    """
    groups = vectors.shape[1]
    run = -(-length // groups)
    if groups == 1 or (run == 1 and tokens is None):
        return vectors
    return vectors.repeat_interleave(run, dim=1)[:, :length] if tokens is None else vectors[:, tokens // run]


def in_grid(x: Tensor, like: Tensor, batch: int = 0) -> Tensor:
    """Tokens (B, L, C) in the grid in which `like`, of the same size, has them. batch: its axis there."""
    return x.reshape(like.movedim(batch, 0).shape).movedim(0, batch)

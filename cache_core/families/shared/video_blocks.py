"""Parts that replays of video blocks share: the sites of their three sublayers, and modulation that serves runs of tokens."""

from __future__ import annotations

from torch import Tensor

from .base import Site

# Keys of the kept outputs. Self-attention is taken from the cache as it is, the other two are recomputed for the chosen tokens.
SELF, CROSS, MLP = "img.self_attn", "img.cross_attn", "img.mlp"


def sites(self_attention: str, cross_attention: str, feed_forward: str) -> tuple[Site, Site, Site]:
    """Returns the sites of blocks with these three modules, given by their paths, over one stream."""
    return Site("self_attn", self_attention, "img"), Site("cross_attn", cross_attention, "img"), Site("mlp", feed_forward, "img")


def spread(vectors: Tensor, length: int, tokens: Tensor | None = None) -> Tensor:
    """Returns the vectors that tokens take where each vector serves a run of tokens, in most models a frame.

    Args:
        vectors: Vectors (B, G, C).
        length: Number of tokens, L. If G does not divide it, the last run is shorter.
        tokens: Indices of the chosen tokens (k,), None for all.

    Returns:
        Vectors (B, L, C), or (B, k, C) of the chosen tokens; (B, 1, C) where G is 1.
    """
    groups = vectors.shape[1]
    run = -(-length // groups)
    if groups == 1 or (run == 1 and tokens is None):
        return vectors
    return vectors.repeat_interleave(run, dim=1)[:, :length] if tokens is None else vectors[:, tokens // run]


def in_grid(x: Tensor, like: Tensor, batch: int = 0) -> Tensor:
    """Returns tokens (B, L, C) in the grid of `like`, a tensor with as many elements whose axis `batch` is the batch."""
    return x.reshape(like.movedim(batch, 0).shape).movedim(0, batch)

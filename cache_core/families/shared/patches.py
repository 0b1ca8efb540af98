"""Cuts the input of a network into tokens, where the network does so by a convolution."""

from __future__ import annotations

from einops import rearrange
from torch import Tensor, nn


def patches(embed: nn.Module, given: Tensor) -> Tensor:
    """Returns the patches (B, L, d), row by row, that a convolution whose kernel is its stride turns into tokens.

    It serves as `ModelFamily.tokens`.

    Args:
        embed: The convolution, or a module that holds it.
        given: Input (B, C, H, W) or (B, C, T, H, W). What does not fill a patch at the end of an axis is cut off, as the convolution does.
    """
    layer = (
        embed if isinstance(embed, (nn.Conv2d, nn.Conv3d)) else next(m for m in embed.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    )
    sides = layer.kernel_size
    for dim, side in enumerate(sides, start=2):
        given = given.narrow(dim, 0, given.shape[dim] // side * side)
    if len(sides) == 2:
        return rearrange(given, "B C (H h) (W w) -> B (H W) (C h w)", h=sides[0], w=sides[1])
    return rearrange(given, "B C (T t) (H h) (W w) -> B (T H W) (C t h w)", t=sides[0], h=sides[1], w=sides[2])

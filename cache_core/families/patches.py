"""The input tokens of models that cut a picture into patches by a convolution."""

from __future__ import annotations

from torch import Tensor, nn


def patches(embed: nn.Module, given: Tensor) -> Tensor:
    """For ModelFamily.tokens: the patches (B, L, d) that a convolution with kernel = stride makes tokens of, row by row.

    given: (B, C, H, W) or (B, C, T, H, W), cut off where the last patch would not be whole, as the convolution does.
    """
    layer = (
        embed if isinstance(embed, (nn.Conv2d, nn.Conv3d)) else next(m for m in embed.modules() if isinstance(m, (nn.Conv2d, nn.Conv3d)))
    )
    for dim, side in enumerate(layer.kernel_size, start=2):
        given = given.unfold(dim, side, side)  # (B, C, cells…, sides…)
    axes = len(layer.kernel_size)
    order = (0, *range(2, 2 + axes), 1, *range(2 + axes, 2 + 2 * axes))
    return given.permute(order).flatten(1 + axes).flatten(1, axes)

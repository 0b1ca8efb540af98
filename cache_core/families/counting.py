"""Multiply-adds of a family's blocks and of what is around them, from its description. Where nothing special has to be counted."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import attrgetter

from torch import Tensor, nn

from ..kinds import Kind
from .base import Lengths, linear_weights, stream_length
from .linears import StackLinears


def blocks_macs(
    linears: Sequence[StackLinears],
    attention: Sequence[tuple[str, str, str]],
    channels: Callable[[nn.Module], int],
    chosen: tuple[str, ...] = (),
    always: tuple[str, ...] = (),
) -> Callable[[nn.Module, Lengths, Kind, float], float]:
    """For ModelFamily.macs: linear layers and attention products of all blocks.

    attention: path of a stack, the stream that asks and the one it looks at, for every attention of one of its blocks.
    chosen, always: of a family with conservative evaluations, prefixes of the layers that its replay computes for the chosen tokens, and
        of those it computes in any case for all their tokens (modulations; a long skip's layer). It takes all others from the cache.
    A stream that no attention of the stack asks from is a context. Attention to it belongs to what is computed for chosen tokens, its
    keys and values are then those of the whole context; with no token chosen there is neither.
    """

    def macs(model: nn.Module, lengths: Lengths, kind: Kind, share: float) -> float:
        if kind is Kind.AGGRESSIVE:
            return 0.0
        is_full, total = kind is Kind.FULL, 0.0
        for stack in linears:
            pairs = [(asking, seen) for path, asking, seen in attention if path == stack.path]
            contexts = {seen for _, seen in pairs} - {asking for asking, _ in pairs}

            def part(name: str, stream: str, contexts: set[str] = contexts) -> float:
                if is_full or name.startswith(always):
                    return 1.0
                return float(share > 0 if stream in contexts else share) if name.startswith(chosen) else 0.0

            blocks = attrgetter(stack.path)(model)
            blocks = list(blocks.values() if isinstance(blocks, nn.ModuleDict) else blocks)
            total += sum(_layers_macs(stack, block, lengths, part) for block in blocks)
            products = 0.0
            for asking, seen in pairs:
                weight = 1.0 if is_full else share if seen in contexts else 0.0
                products += weight * stream_length(asking, lengths) * stream_length(seen, lengths)
            total += 2 * len(blocks) * products * channels(model)
        return total

    return macs


def _layers_macs(stack: StackLinears, block: nn.Module, lengths: Lengths, part: Callable[[str, str], float]) -> float:
    """part: how much of its tokens a layer of this name and stream computes; the stream is "" where it works on one vector."""
    total = 0.0
    for name, layer in block.named_modules():
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            stream = "" if name.startswith(stack.skip) else stack.stream(name)
            tokens = stream_length(stream, lengths) if stream else 1
            total += part(name, stream) * tokens * int(layer.in_features) * int(layer.out_features)
    return total


def around_macs(places: Mapping[str, str]) -> Callable[[nn.Module, Lengths], float]:
    """For ModelFamily.outside_macs. places: path of a module outside the blocks -> the stream it works on, "" for a single vector.

    A convolution that cuts a picture into patches, or looks at the neighbours of every patch, counts once per patch.
    A path that a model lacks costs nothing.
    """

    def macs(model: nn.Module, lengths: Lengths) -> float:
        total = 0.0
        for path, stream in places.items():
            module = _at(model, path)
            tokens = stream_length(stream, lengths) if stream else 1
            total += tokens * (linear_weights(module) + _patch_weights(module))
        return total

    return macs


def _at(model: nn.Module, path: str) -> nn.Module | None:
    try:
        return attrgetter(path)(model)
    except AttributeError:
        return None


def _patch_weights(module: nn.Module | None) -> int:
    """Weights of all convolutions that are computed once per patch: their kernels do not overlap, or they start at each."""
    if module is None:
        return 0
    layers = [layer for layer in module.modules() if isinstance(layer, (nn.Conv2d, nn.Conv3d))]
    return sum(
        layer.out_channels * patch_channels(layer) for layer in layers if layer.stride == layer.kernel_size or set(layer.stride) == {1}
    )


def patch_channels(layer: nn.Conv2d | nn.Conv3d) -> int:
    """Numbers in one patch, for ModelFamily.input_channels."""
    size = layer.in_channels
    for side in layer.kernel_size:
        size *= side
    return size


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

"""Finds the linear layers inside blocks that are given tokens: these can answer with a low-rank increment (ICC)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

from torch import nn

from ..blocks import unwrapped
from .watch import Spec

_FEW = 3  # vectors per batch row that are not tokens yet, such as one for each kind of frame; tokens are more
LayerKey = tuple[str, int, str]  # path of the list of blocks, index of the block, dotted path inside the block


class LayerCall(NamedTuple):
    """The calls of one layer in one evaluation.

    Args:
        tokens: Number of tokens per batch row, for every call in order.
        batch: Axis of the batch in the layer's input, or of batch times groups of tokens.
    """

    tokens: tuple[int, ...]
    batch: int = 0


def linear_layers(path: str, blocks: Sequence[nn.Module]) -> Iterator[tuple[LayerKey, nn.Module]]:
    """Yields the key and the module of every linear layer inside the blocks of one list.

    A layer is known by its `in_features` and `out_features`, as quantised and wrapped layers need not be `nn.Linear`.
    """
    for index, block in enumerate(blocks):
        outer = ""
        for name, module in unwrapped(block).named_modules():
            if not (hasattr(module, "in_features") and hasattr(module, "out_features")) or (outer and name.startswith(f"{outer}.")):
                continue  # the second case: it lies inside a wrapper that is itself called as the layer
            outer = name
            yield (path, index, name), module


def token_layers(given: Mapping[LayerKey, Sequence[Spec]], rows: int, axis: int | None) -> dict[LayerKey, LayerCall]:
    """Selects the layers that are given tokens of every batch row.

    A modulation layer is given one vector per row, or a few. An expert is given whichever tokens are routed to it, one after another.

    Args:
        given: The inputs of every layer, in order of its calls.
        rows: Batch rows of the model call.
        axis: Axis of the batch in the hidden state, None where it has none.
    """
    found = {}
    for key, specs in given.items():
        batch = _batch(specs, rows, axis)
        if batch is not None and all(len(spec.shape) >= 3 and spec.shape[batch] % rows == 0 for spec in specs):
            tokens = tuple(prod(spec.shape[:-1]) // rows for spec in specs)
            if min(tokens) > _FEW:
                found[key] = LayerCall(tokens, batch)
    return found


def _batch(specs: Sequence[Spec], rows: int, axis: int | None) -> int | None:
    """Returns the axis of the batch in a layer's inputs, None where it is not found.

    Where the batch is not the first axis of the hidden state, it is the same axis here, or the one next to the channels, as in text
    beside a grid of image tokens.
    """
    if not axis:
        return 0
    for at in (axis, len(specs[0].shape) - 2):
        if at > 0 and all(len(spec.shape) > at + 1 and spec.shape[at] == rows for spec in specs):
            return at
    return None

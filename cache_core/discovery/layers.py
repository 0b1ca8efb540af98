"""Linear layers inside blocks, found by their calls: those that are given tokens can answer with a low-rank increment (ICC)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from math import prod
from typing import NamedTuple

from torch import nn

from .watch import Spec

_FEW = 3  # vectors a row, for as many kinds of frames, say; tokens are more
LayerKey = tuple[str, int, str]  # path of the list, index of the block, dotted path inside the block


class LayerCall(NamedTuple):
    """tokens: of every batch row in each call of one evaluation. batch: axis of the batch, or of batch times groups of tokens."""

    tokens: tuple[int, ...]
    batch: int = 0


def linear_layers(path: str, blocks: Sequence[nn.Module]) -> Iterator[tuple[LayerKey, nn.Module]]:
    """What has `in_features` and `out_features`: quantised and wrapped layers need not be `nn.Linear`."""
    for index, block in enumerate(blocks):
        outer = ""
        for name, module in getattr(block, "_orig_mod", block).named_modules():  # a compiled block wraps the real one
            if not (hasattr(module, "in_features") and hasattr(module, "out_features")) or (outer and name.startswith(f"{outer}.")):
                continue  # the latter lies in a wrapper that is itself called as the layer
            outer = name
            yield (path, index, name), module


def token_layers(given: Mapping[LayerKey, Sequence[Spec]], rows: int, axis: int | None) -> dict[LayerKey, LayerCall]:
    """Of layers that were given such inputs, those that get tokens of every batch row.

    A modulation gets one vector a row, or a few; an expert whichever tokens are sent to it, side by side. axis: the batch of the hidden
    state.
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
    """The axis of the batch in a layer's inputs. Where it is not the first of the hidden state, it is there or next to the channels, as
    text beside a grid has it; None where it is at neither.
    """
    if not axis:
        return 0
    for place in (axis, len(specs[0].shape) - 2):
        if place > 0 and all(len(spec.shape) > place + 1 and spec.shape[place] == rows for spec in specs):
            return place
    return None

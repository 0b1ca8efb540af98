"""Describes linear layers that hold several matrices: increment-calibrated caching (ICC, arXiv 2505.05829) factorises each on its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any


@dataclass(frozen=True)
class LinearPart:
    """One matrix inside a fused layer.

    Args:
        name: Name of the matrix: q, k, v, gate, mlp or the like.
        rows: The output channels of the layer that the matrix makes; None for all.
    """

    name: str
    rows: slice | None = None


def equal_parts(layer: str, names: Sequence[str]) -> dict[str, Callable[[Any], tuple[LinearPart, ...]]]:
    """Returns an entry of `ModelFamily.fused` for a layer whose outputs are divided equally among its matrices.

    Args:
        layer: Dotted path of the layer inside the block.
        names: Names of the matrices, in the order of their outputs, such as "qkv".
    """

    def parts(block: Any) -> tuple[LinearPart, ...]:
        rows = attrgetter(layer)(block).out_features // len(names)
        return tuple(LinearPart(name, slice(i * rows, (i + 1) * rows)) for i, name in enumerate(names))

    return {layer: parts}


UNSPLIT = LinearPart("all")

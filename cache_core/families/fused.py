"""Linear layers that are several matrices in one, for increment-calibrated caching (ICC, arXiv 2505.05829), which takes each alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any


@dataclass(frozen=True)
class LinearPart:
    """One matrix inside a fused layer: `rows` of its outputs; None is all of them."""

    name: str
    rows: slice | None = None


def equal_parts(layer: str, names: Sequence[str]) -> dict[str, Callable[[Any], tuple[LinearPart, ...]]]:
    """A part of ModelFamily.fused: a fused layer of equally many rows for each of `names`, such as "qkv"."""

    def parts(block: Any) -> tuple[LinearPart, ...]:
        rows = attrgetter(layer)(block).out_features // len(names)
        return tuple(LinearPart(name, slice(i * rows, (i + 1) * rows)) for i, name in enumerate(names))

    return {layer: parts}


UNSPLIT = LinearPart("all")

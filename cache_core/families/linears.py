"""How the linear layers of a family's blocks are described, for increment-calibrated caching (ICC, arXiv 2505.05829).

Which layers count, which of them are several matrices in one, and whose tokens each works on. Nothing here touches a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from operator import attrgetter
from typing import Any


@dataclass(frozen=True)
class LinearPart:
    """One matrix inside a fused layer: `rows` of its outputs; None is all of them."""

    name: str
    rows: slice | None = None


@dataclass(frozen=True)
class StackLinears:
    """The linear layers of a stack's blocks. Layers are named by their dotted path inside the block.

    path: of the stack, as `families.base.Stack` has it.
    streams: prefix of a layer's name -> the stream whose tokens it works on, first match; "" matches all.
    skip: prefixes of layers whose input is not per token (the conditioning vector: modulation) or not all tokens (experts). They are left
        to the host, in calibrated evaluations too; multiply-adds count them once, for one vector.
    grouped: prefixes of layers whose tokens come in groups (B·groups, L/groups, C), always the same ones: a group a frame, or a position.
    pieces: prefixes of layers that may be called several times in an evaluation with some of their tokens each, always the same ones.
    batch: axis of the batch in what the layers get and give: the first, but where the tokens lie before it in a grid (…, B, C).
    parts: layer -> its parts, given the block, for layers that are several matrices; others are one part, `WHOLE`.
        Together they cover the layer's outputs once.
    """

    path: str
    streams: Mapping[str, str]
    skip: tuple[str, ...] = ()
    grouped: tuple[str, ...] = ()
    pieces: tuple[str, ...] = ()
    batch: int = 0
    parts: Mapping[str, Callable[[Any], tuple[LinearPart, ...]]] | None = None

    def stream(self, layer: str) -> str:
        """Raises ValueError for a layer of no known stream: its tokens cannot be counted."""
        for prefix, stream in self.streams.items():
            if layer.startswith(prefix):
                return stream
        raise ValueError(f"{self.path}: no token stream is known for the layer {layer}")

    def parts_of(self, block: Any, layer: str) -> tuple[LinearPart, ...]:
        """The parts of a layer of this block."""
        return self.parts[layer](block) if self.parts and layer in self.parts else (WHOLE,)


def equal_parts(layer: str, names: Sequence[str]) -> dict[str, Callable[[Any], tuple[LinearPart, ...]]]:
    """For StackLinears.parts: a fused layer of equally many rows for each of `names`, such as "qkv"."""

    def parts(block: Any) -> tuple[LinearPart, ...]:
        rows = attrgetter(layer)(block).out_features // len(names)
        return tuple(LinearPart(name, slice(i * rows, (i + 1) * rows)) for i, name in enumerate(names))

    return {layer: parts}


WHOLE = LinearPart("all")

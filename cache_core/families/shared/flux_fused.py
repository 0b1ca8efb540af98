"""Splits the fused linear layers of FLUX's blocks into the matrices that they hold."""

from __future__ import annotations

from operator import attrgetter
from types import MappingProxyType
from typing import Any

from .fused import UNSPLIT, LinearPart


def _qkv(block: Any) -> tuple[LinearPart, ...]:
    width = block.hidden_size
    return tuple(LinearPart(name, rows=slice(i * width, (i + 1) * width)) for i, name in enumerate("qkv"))


def _mlp_in(layers: tuple[Any, Any]) -> tuple[LinearPart, ...]:
    """Returns the parts of the first of an MLP's two layers: gate and value where it makes twice what the second takes (FLUX.2)."""
    first, second = layers
    return _gate_and_value(0, second.in_features) if first.out_features == 2 * second.in_features else (UNSPLIT,)


def _qkv_and_mlp(block: Any) -> tuple[LinearPart, ...]:
    start, inner = 3 * block.hidden_size, block.linear2.in_features - block.hidden_size
    is_gated = block.linear1.out_features == start + 2 * inner
    return (*_qkv(block), *(_gate_and_value(start, inner) if is_gated else (LinearPart("mlp", rows=slice(start, None)),)))


def _gate_and_value(start: int, width: int) -> tuple[LinearPart, ...]:
    return LinearPart("gate", slice(start, start + width)), LinearPart("value", slice(start + width, start + 2 * width))


FLUX_FUSED = MappingProxyType(
    {
        "double_blocks": {
            "img_attn.qkv": _qkv,
            "txt_attn.qkv": _qkv,
            "img_mlp.0": lambda block: _mlp_in(attrgetter("img_mlp.0", "img_mlp.2")(block)),
            "txt_mlp.0": lambda block: _mlp_in(attrgetter("txt_mlp.0", "txt_mlp.2")(block)),
        },
        "single_blocks": {"linear1": _qkv_and_mlp},
    }
)

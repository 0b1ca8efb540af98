"""The linear layers of FLUX.1's blocks: which are several matrices in one, and whose tokens each works on."""

from __future__ import annotations

from typing import Any

from .linears import LinearPart, StackLinears


def _qkv(block: Any) -> tuple[LinearPart, ...]:
    width = block.hidden_size
    return tuple(LinearPart(name, rows=slice(i * width, (i + 1) * width)) for i, name in enumerate("qkv"))


def _qkv_and_mlp(block: Any) -> tuple[LinearPart, ...]:
    return (*_qkv(block), LinearPart("mlp", rows=slice(3 * block.hidden_size, None)))


FLUX_LINEARS = (
    StackLinears(
        path="double_blocks",
        streams={"img_": "img", "txt_": "txt"},
        skip=("img_mod.", "txt_mod."),
        parts={"img_attn.qkv": _qkv, "txt_attn.qkv": _qkv},
    ),
    StackLinears(
        path="single_blocks",
        streams={"": "txt+img"},
        skip=("modulation.",),
        parts={"linear1": _qkv_and_mlp},
    ),
)

"""ERNIE-Image: one stream of image tokens, then text, through blocks that share one modulation.

Source: comfy/ldm/ernie/model.py of ComfyUI 0.33.0, where it is tested; 0.3.75 has no such class.

Blocks return a new tensor. Traps: a block sees only the joint stream, so the text is counted where it is projected, and a model whose text
is as wide as its blocks, which has no projection, is not this family; the head works on all tokens and cuts the image off afterwards.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

from .as_read import blocks_take, has, layers_are
from .base import ModelFamily, Stack
from .counting import around_macs, blocks_macs, patch_channels, patches
from .linears import StackLinears

_JOINT = "img+txt"
_PARAMETERS = ("x", "rotary_pos_emb", "temb", "attention_mask")
_AROUND = (
    "x_embedder.proj", "text_proj", "time_embedding.linear_1", "time_embedding.linear_2", "pos_embed", "adaLN_modulation",
    "final_norm.linear", "final_linear", "hidden_size", "patch_size", "out_channels",
)  # fmt: skip
_LAYERS = (
    *(f"self_attention.to_{name}" for name in ("q", "k", "v", "out.0")),
    *(f"mlp.{name}" for name in ("gate_proj", "up_proj", "linear_fc2")),
)
_LINEARS = (StackLinears(path="layers", streams={"": _JOINT}),)


def _is_ernie(model: Any) -> bool:
    if type(model).__name__ != "ErnieImageModel" or not has(model, *_AROUND):
        return False
    if not blocks_take(model, "layers", *_PARAMETERS) or not layers_are(model, "layers", *_LAYERS):
        return False
    return isinstance(model.x_embedder.proj, nn.Conv2d) and model.x_embedder.proj.kernel_size == model.x_embedder.proj.stride


ERNIE = ModelFamily(
    name="ernie",
    matches=_is_ernie,
    stacks=(Stack(path="layers", parameters=_PARAMETERS, streams={"x": _JOINT}),),
    measures={"text_proj": "txt"},
    hidden="img",
    channels=attrgetter("hidden_size"),
    embed="x_embedder.proj",
    input_channels=lambda model: patch_channels(attrgetter("x_embedder.proj")(model)),
    tokens=patches,
    macs=blocks_macs(_LINEARS, (("layers", _JOINT, _JOINT),), attrgetter("hidden_size")),
    outside_macs=around_macs(
        {"x_embedder": "img", "text_proj": "txt", "time_embedding": "", "adaLN_modulation": "", "final_norm": "", "final_linear": _JOINT}
    ),
    linears=_LINEARS,
)

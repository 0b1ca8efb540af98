"""Mochi: blocks with separate video and text streams of different width, joint attention over video, text.

Source: comfy/ldm/genmo/joint_model/asymm_models_joint.py (ComfyUI 0.3.75). Of the text only the first `crop_y` tokens take part in
attention. The last block does not update the text.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from .base import Lengths, ModelFamily, Stack
from .counting import around_macs, blocks_macs, patches
from .linears import StackLinears, equal_parts

_LINEARS = (
    StackLinears(
        path="blocks",
        streams={"attn.qkv_y": "txt", "attn.proj_y": "txt", "mlp_y.": "txt", "": "img"},
        skip=("mod_x", "mod_y"),
        parts=equal_parts("attn.qkv_x", "qkv")
        | equal_parts("attn.qkv_y", "qkv")
        | equal_parts("mlp_x.w1", "vg")
        | equal_parts("mlp_y.w1", "vg"),
    ),
)


def _seen_text(call: Mapping[str, Any], lengths: Lengths) -> Lengths:
    return {"seen": min(int(call.get("crop_y", lengths["txt"])), lengths["txt"])}


def _patches(embed: nn.Module, given: Tensor) -> Tensor:
    """Frame by frame, as the embedding does it. given: (B, C, T, H, W)."""
    frames = given.transpose(1, 2).flatten(0, 1)
    return patches(embed, frames).unflatten(0, given.shape[:1] + given.shape[2:3]).flatten(1, 2)


MOCHI = ModelFamily(
    name="mochi",
    matches=lambda model: type(model).__name__ == "AsymmDiTJoint" and hasattr(model, "blocks"),
    stacks=(Stack(path="blocks", parameters=("x", "c", "y", "transformer_options"), streams={"x": "img", "y": "txt"}, counts=_seen_text),),
    hidden="img",
    channels=attrgetter("hidden_size_x"),
    embed="x_embedder",
    input_channels=lambda model: int(model.in_channels) * int(model.patch_size) ** 2,  # type: ignore[arg-type]
    tokens=_patches,
    macs=blocks_macs(_LINEARS, (("blocks", "img+seen", "img+seen"),), attrgetter("hidden_size_x")),
    outside_macs=around_macs(
        {
            "x_embedder": "img",
            "t_embedder": "",
            "t5_y_embedder.to_kv": "txt",
            "t5_y_embedder.to_q": "",
            "t5_y_embedder.to_out": "",
            "t5_yproj": "txt",
            "final_layer.mod": "",
            "final_layer.linear": "img",
        }
    ),
    linears=_LINEARS,
)

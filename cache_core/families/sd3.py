"""Stable Diffusion 3 and 3.5: joint blocks of a text and an image half, attention over text, image.

Source: comfy/ldm/modules/diffusionmodules/mmdit.py (ComfyUI 0.3.75). Traps: the last block's text half ends with its keys and values and
returns None for text; in SD3.5-medium the image half of some blocks has a second attention over the image alone (attn2). The host adds
ControlNet residuals to the image after each block, in place.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

from ..kinds import Kind
from .base import Lengths, ModelFamily, Stack
from .counting import around_macs, blocks_macs, patch_channels, patches
from .linears import StackLinears, equal_parts


def _is_sd3(model: nn.Module) -> bool:
    """AuraFlow's class is named MMDiT too."""
    if type(model).__name__ not in ("OpenAISignatureMMDITWrapper", "MMDiT") or not len(getattr(model, "joint_blocks", ())):
        return False
    return all(hasattr(model.joint_blocks[0], name) for name in ("context_block", "x_block"))  # type: ignore[index]


_LINEARS = (
    StackLinears(
        path="joint_blocks",
        streams={"context_block.": "txt", "x_block.": "img"},
        skip=("context_block.adaLN_modulation.", "x_block.adaLN_modulation."),
        parts={
            name: parts
            for layer in ("context_block.attn.qkv", "x_block.attn.qkv", "x_block.attn2.qkv")
            for name, parts in equal_parts(layer, "qkv").items()
        },
    ),
)
_JOINT_MACS = blocks_macs(_LINEARS, (("joint_blocks", "txt+img", "txt+img"),), attrgetter("hidden_size"))


def _macs(model: Any, lengths: Lengths, kind: Kind, share: float) -> float:
    if kind is Kind.AGGRESSIVE:
        return 0.0
    second = sum(hasattr(block.x_block, "attn2") for block in model.joint_blocks)
    return _JOINT_MACS(model, lengths, kind, share) + 2 * second * lengths["img"] ** 2 * model.hidden_size


SD3 = ModelFamily(
    name="sd3",
    matches=_is_sd3,
    stacks=(Stack(path="joint_blocks", parameters=("context", "x"), streams={"context": "txt", "x": "img"}),),
    hidden="img",
    channels=attrgetter("hidden_size"),
    embed="x_embedder.proj",
    input_channels=lambda model: patch_channels(attrgetter("x_embedder.proj")(model)),
    tokens=patches,
    macs=_macs,
    outside_macs=around_macs(
        {
            "x_embedder": "img",
            "context_processor": "txt",
            "context_embedder": "txt",
            "t_embedder": "",
            "y_embedder": "",
            "final_layer.linear": "img",
            "final_layer.adaLN_modulation": "",
        }
    ),
    linears=_LINEARS,
)

"""AuraFlow: double blocks with separate text and image streams, then single blocks over text, image.

Source: comfy/ldm/aura/mmdit.py (ComfyUI 0.3.75). Eight register tokens lead the text. A block normalises x + gate·attn again and adds only
the gated MLP of that to its input, so attention and MLP are not two terms of a sum. ControlNet is not known to the model.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

from .base import Lengths, ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import StackLinears


def _is_aura(model: nn.Module) -> bool:
    """SD3's class is named MMDiT too."""
    return type(model).__name__ == "MMDiT" and all(len(getattr(model, name, ())) for name in ("double_layers", "single_layers"))


def _channels(model: Any) -> int:
    return int(model.init_x_linear.out_features)


_LINEARS = (
    StackLinears(
        path="double_layers",
        streams={"attn.w1": "txt", "attn.w2": "img", "mlpC.": "txt", "mlpX.": "img"},
        skip=("modC.", "modX."),
    ),
    StackLinears(path="single_layers", streams={"": "txt+img"}, skip=("modCX.",)),
)
_AROUND = around_macs({"init_x_linear": "img", "cond_seq_linear": "words", "t_embedder": "", "modF": "", "final_linear": "img"})


def _outside_macs(model: Any, lengths: Lengths) -> float:
    return _AROUND(model, {**lengths, "words": lengths["txt"] - model.register_tokens.shape[1]})


AURA = ModelFamily(
    name="aura",
    matches=_is_aura,
    stacks=(
        Stack(path="double_layers", parameters=("c", "x", "global_cond"), streams={"c": "txt", "x": "img"}),
        Stack(path="single_layers", parameters=("cx", "global_cond"), streams={"cx": "txt+img"}),
    ),
    hidden="img",
    channels=_channels,
    embed="init_x_linear",
    input_channels=attrgetter("init_x_linear.in_features"),
    macs=blocks_macs(_LINEARS, (("double_layers", "txt+img", "txt+img"), ("single_layers", "txt+img", "txt+img")), _channels),
    outside_macs=_outside_macs,
    linears=_LINEARS,
)

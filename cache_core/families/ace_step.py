"""ACE-Step: blocks of linear self-attention, cross-attention to text and lyrics, and a gated convolution along time, over audio frames.

Source: comfy/ldm/ace (ComfyUI 0.3.75). Attention sums over all frames and the convolution looks at neighbours, so no frame stands alone:
no conservative evaluation (cross-attention could be renewed for some frames, but is about a sixth of a block). Calibrated ones replace the
linear layers of both attentions; the convolutions, two thirds of a block, run.
Layers named add_… are in the checkpoint and never used. Speaker, prompt and lyrics are one sequence by the time the blocks see it.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

from ..kinds import Kind
from .base import Lengths, ModelFamily, Stack
from .counting import around_macs, blocks_macs, patches
from .linears import StackLinears

_LINEARS = (
    StackLinears(
        path="transformer_blocks",
        streams={"cross_attn.to_k": "txt", "cross_attn.to_v": "txt", "": "audio"},
        skip=("cross_attn.add_", "cross_attn.to_add_out"),
    ),
)
_CROSS_AND_LINEAR = blocks_macs(_LINEARS, (("transformer_blocks", "audio", "txt"),), attrgetter("inner_dim"))


def _macs(model: Any, lengths: Lengths, kind: Kind, share: float) -> float:
    if kind is Kind.AGGRESSIVE:
        return 0.0
    total = _CROSS_AND_LINEAR(model, lengths, kind, share)
    for block in model.transformer_blocks:
        convolutions = [layer for layer in block.ff.modules() if isinstance(layer, nn.Conv1d)]
        per_frame = sum(layer.out_channels * layer.in_channels // layer.groups * layer.kernel_size[0] for layer in convolutions)
        total += lengths["audio"] * (per_frame + 2 * model.inner_dim * model.attention_head_dim)  # keys·values, then queries·that
    return total


ACE_STEP = ModelFamily(
    name="ace_step",
    matches=lambda model: type(model).__name__ == "ACEStepTransformer2DModel" and hasattr(model, "transformer_blocks"),
    stacks=(
        Stack(
            path="transformer_blocks",
            parameters=("hidden_states", "encoder_hidden_states"),
            streams={"hidden_states": "audio"},
            contexts={"encoder_hidden_states": "txt"},
        ),
    ),
    hidden="audio",
    channels=attrgetter("inner_dim"),
    embed="proj_in",
    input_channels=lambda model: int(model.in_channels) * model.patch_size[0] * model.patch_size[1],  # type: ignore[index, arg-type, return-value]
    tokens=patches,
    macs=_macs,
    outside_macs=around_macs(
        {
            "proj_in": "audio",
            "t_block": "",
            "timestep_embedder": "",
            "lyric_encoder": "txt",
            "genre_embedder": "txt",
            "final_layer": "audio",
        }
    ),
    linears=_LINEARS,
)

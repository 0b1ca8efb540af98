"""CogVideoX 1.0 and 1.5: blocks with separate video and text streams whose layers all work on text, video in one sequence.

Source: comfy/ldm/cogvideo/model.py of ComfyUI 0.33.0, where it is tested; 0.3.75 has no such class.
A block returns new tensors, video before text; the last one's text is thrown away. Modulation is one vector a call and stream.
Two families, for they differ where tokens are made: 1.0 cuts every frame with a convolution that sees frames as a batch, so nobody can tell
there which tokens belong to one video, and it has no calibrated forecast; 1.5 cuts blocks of frames and has one.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import nn

from .as_read import blocks_take, has
from .base import ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import StackLinears

_JOINT = "txt+img"
_BLOCK = ("hidden_states", "encoder_hidden_states", "temb", "image_rotary_emb", "transformer_options")
_LINEARS = (StackLinears(path="blocks", streams={"": _JOINT}, skip=("norm1.", "norm2.")),)
_NEEDED = ("dim", "patch_embed.proj", "patch_embed.text_proj", "norm_out.linear", "proj_out", "patch_size")


def _is_cogvideox(model: nn.Module) -> bool:
    return type(model).__name__ == "CogVideoXTransformer3DModel" and blocks_take(model, "blocks", *_BLOCK) and has(model, *_NEEDED)


def _family(name: str, cuts_time: bool, embed: str, input_channels: Any) -> ModelFamily:
    """cuts_time: whether a patch is several frames deep, as in 1.5."""
    return ModelFamily(
        name=name,
        matches=lambda model: _is_cogvideox(model) and (getattr(model, "patch_size_t", None) is not None) == cuts_time,
        stacks=(Stack(path="blocks", parameters=_BLOCK, streams={"hidden_states": "img", "encoder_hidden_states": "txt"}),),
        hidden="img",
        channels=attrgetter("dim"),
        embed=embed,
        input_channels=input_channels,
        macs=blocks_macs(_LINEARS, (("blocks", _JOINT, _JOINT),), attrgetter("dim")),
        outside_macs=around_macs(
            {
                "patch_embed.proj": "img",
                "patch_embed.text_proj": "txt",
                "time_embedding_linear_1": "",
                "time_embedding_linear_2": "",
                "ofs_embedding_linear_1": "",
                "ofs_embedding_linear_2": "",
                "norm_out": "",
                "proj_out": "img",
            }
        ),
        linears=_LINEARS,
    )


COGVIDEOX = _family("cogvideox", False, "", lambda _model: 0)
COGVIDEOX_1_5 = _family("cogvideox_1_5", True, "patch_embed.proj", attrgetter("patch_embed.proj.in_features"))

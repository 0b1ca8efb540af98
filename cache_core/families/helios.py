"""Helios: Wan-like blocks over one stream of video tokens, after tokens of the video so far at three resolutions.

Source: comfy/ldm/helios/model.py of comfyanonymous/ComfyUI, read at 26f44ab7, which is of pull request 12765 of Comfy-Org/ComfyUI:
not merged when it was read. Untested on the real host: read from source, tried on a stand-in.

Blocks return a new tensor. The history lies before the video ("hist+img"); every block is told how many tokens the video has. Text is
looked at by the video alone where `guidance_cross_attn` is on, as it is by default; models with it off are not this family. A video is made
chunk by chunk, every chunk with another history: each sampling is a run of its own. Embedding the history is not counted.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from operator import attrgetter
from typing import Any

from torch import nn

from .as_read import blocks_take, has, layers_are
from .base import Lengths, ModelFamily, Stack
from .counting import around_macs, blocks_macs, patches
from .linears import StackLinears

_JOINT = "hist+img"
_PARAMETERS = ("x", "context", "e", "freqs", "original_context_length", "transformer_options")
_AROUND = (
    "patch_embedding", "patch_short", "patch_mid", "patch_long", "text_embedding", "time_embedding", "time_projection", "rope_embedder",
    "norm_out.scale_shift_table", "proj_out.in_features", "dim", "patch_size",
)  # fmt: skip
_LAYERS = (*(f"attn{number}.to_{name}" for number in (1, 2) for name in ("q", "k", "v", "out.0")), "ffn.0", "ffn.2")
_LINEARS = (StackLinears(path="blocks", streams={"attn2.to_k": "txt", "attn2.to_v": "txt", "attn2.": "img", "": _JOINT}),)


def _is_helios(model: Any) -> bool:
    if type(model).__name__ != "HeliosModel" or not has(model, *_AROUND):
        return False
    if not blocks_take(model, "blocks", *_PARAMETERS) or not layers_are(model, "blocks", *_LAYERS):
        return False
    if not isinstance(model.patch_embedding, nn.Conv3d) or model.patch_embedding.kernel_size != model.patch_embedding.stride:
        return False
    return all(getattr(block, "guidance_cross_attn", False) is True for block in model.blocks)


def _counts(call: Mapping[str, Any], _lengths: Lengths) -> Lengths:
    """Nothing where a call does not say how many tokens the video has."""
    video = call.get("original_context_length")
    return {} if video is None else {"img": video}


HELIOS = ModelFamily(
    name="helios",
    matches=_is_helios,
    stacks=(
        Stack(
            path="blocks",
            parameters=_PARAMETERS,
            streams={"x": _JOINT},
            contexts={"context": "txt"},
            counts=_counts,
        ),
    ),
    hidden="img",
    channels=attrgetter("dim"),
    embed="patch_embedding",
    input_channels=lambda model: int(model.patch_embedding.in_channels) * prod(model.patch_size),  # type: ignore[union-attr, arg-type]
    tokens=patches,
    macs=blocks_macs(_LINEARS, (("blocks", _JOINT, _JOINT), ("blocks", "img", "txt")), attrgetter("dim")),
    outside_macs=around_macs(
        {"patch_embedding": "img", "text_embedding": "txt", "time_embedding": "", "time_projection": "", "proj_out": "img"}
    ),
    linears=_LINEARS,
)

"""Lumina-Image 2.0 and Z-Image (NextDiT): text and image in one stream, text first.

Source: comfy/ldm/lumina/model.py (ComfyUI 0.3.75). The refiners run before the blocks and stay the host's. Traps: a block sees only the
joint stream, so text and image are counted where they enter their refiner and their embedding; Z-Image fills both up to a multiple of 32
with tokens of its own, those of the image after the image. Hosts after 0.3.75 know reference pictures: those that follow the image as if
they were part of it are cached with it; those that are modulated apart (timestep_zero_index) are computed in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..kinds import Kind
from .base import Cached, Lengths, ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import LinearPart, StackLinears
from .replaying import sandwiched, stream_sites

_JOINT = "txt+img+padding"


def _is_lumina(model: nn.Module) -> bool:
    refiners = (getattr(model, name, ()) for name in ("layers", "context_refiner", "noise_refiner"))
    return type(model).__name__ == "NextDiT" and all(len(blocks) for blocks in refiners)


def _qkv(block: Any) -> tuple[LinearPart, ...]:
    """Lumina 2 has fewer keys and values than queries."""
    attention = block.attention
    q, kv = attention.n_local_heads * attention.head_dim, attention.n_local_kv_heads * attention.head_dim
    return LinearPart("q", slice(0, q)), LinearPart("k", slice(q, q + kv)), LinearPart("v", slice(q + kv, q + 2 * kv))


def _linears(path: str, stream: str) -> StackLinears:
    return StackLinears(path, {"": stream}, skip=("adaLN_modulation.",), parts={"attention.qkv": _qkv})


_LINEARS = (_linears("layers", _JOINT),)
_REFINERS = blocks_macs(
    (_linears("context_refiner", "txt"), _linears("noise_refiner", "img+padding")),
    (("context_refiner", "txt", "txt"), ("noise_refiner", "img+padding", "img+padding")),
    attrgetter("dim"),
)
_AROUND = around_macs(
    {"x_embedder": "img", "cap_embedder": "txt", "t_embedder": "", "final_layer.linear": _JOINT, "final_layer.adaLN_modulation": ""}
)


def _outside_macs(model: Any, lengths: Lengths) -> float:
    return _AROUND(model, lengths) + _REFINERS(model, lengths, Kind.FULL, 1.0)


def _replay(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    modulation = block.adaLN_modulation(call["adaln_input"])[:, None].chunk(4, dim=-1)
    return (sandwiched(cached, _JOINT, call["x"], modulation, block, block.attention_norm2),)


def _why_not(call: Mapping[str, Any]) -> str:
    """Each picture is filled up by itself, so the image is not where it is otherwise: behind all others, not behind the text."""
    return "" if call.get("timestep_zero_index") is None else "reference pictures modulated apart from the image"


LUMINA = ModelFamily(
    name="lumina",
    matches=_is_lumina,
    stacks=(
        Stack(
            path="layers",
            parameters=("x", "x_mask", "freqs_cis", "adaln_input"),
            streams={"x": _JOINT},
            why_not=_why_not,
            sites=stream_sites(_JOINT, "attention", "feed_forward"),
            replay=_replay,
        ),
    ),
    measures={"context_refiner.0": "txt", "x_embedder": "img"},
    hidden="img",
    channels=attrgetter("dim"),
    embed="x_embedder",
    input_channels=attrgetter("x_embedder.in_features"),
    macs=blocks_macs(_LINEARS, (("layers", _JOINT, _JOINT),), attrgetter("dim"), chosen=("feed_forward.",), always=("adaLN_modulation.",)),
    outside_macs=_outside_macs,
    linears=_LINEARS,
)

"""OmniGen2: text, reference pictures and image in one stream, in this order.

Source: comfy/ldm/omnigen/omnigen2.py (ComfyUI 0.3.75). The refiners of text, references and image run before the blocks and stay the
host's. Traps: a block sees only the joint stream, so text and image are counted where they enter their refiner and their embedding, and
what is left are references; fewer heads for keys and values than for queries; the host runs the head over all tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..kinds import Kind
from .base import Cached, Lengths, ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import StackLinears
from .replaying import sandwiched, stream_sites

_JOINT = "txt+ref+img"


def _is_omnigen(model: nn.Module) -> bool:
    is_named = type(model).__name__ == "OmniGen2Transformer2DModel"
    return is_named and all(len(getattr(model, name, ())) for name in ("layers", "context_refiner"))


def _linears(path: str, stream: str) -> StackLinears:
    return StackLinears(path, {"": stream}, skip=("norm1.linear",))


_LINEARS = (_linears("layers", _JOINT),)
_REFINERS = blocks_macs(
    (_linears("context_refiner", "txt"), _linears("noise_refiner", "img"), _linears("ref_image_refiner", "ref")),
    (("context_refiner", "txt", "txt"), ("noise_refiner", "img", "img"), ("ref_image_refiner", "ref", "ref")),
    attrgetter("hidden_size"),
)
_AROUND = around_macs(
    {"x_embedder": "img", "ref_image_patch_embedder": "ref", "time_caption_embed.timestep_embedder": "",
     "time_caption_embed.caption_embedder": "txt", "norm_out.linear_1": "", "norm_out.linear_2": _JOINT}
)  # fmt: skip


def _outside_macs(model: Any, lengths: Lengths) -> float:
    return _AROUND(model, lengths) + _REFINERS(model, lengths, Kind.FULL, 1.0)


def _replay(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    modulation = block.norm1.linear(block.norm1.silu(call["temb"]))[:, None].chunk(4, dim=-1)
    return (sandwiched(cached, _JOINT, call["hidden_states"], modulation, block, block.norm2),)


OMNIGEN = ModelFamily(
    name="omnigen",
    matches=_is_omnigen,
    stacks=(
        Stack(
            path="layers",
            parameters=("hidden_states", "attention_mask", "image_rotary_emb", "temb"),
            streams={"hidden_states": _JOINT},
            sites=stream_sites(_JOINT, "attn", "feed_forward"),
            replay=_replay,
        ),
    ),
    measures={"context_refiner.0": "txt", "x_embedder": "img"},
    hidden="img",
    channels=attrgetter("hidden_size"),
    embed="x_embedder",
    input_channels=attrgetter("x_embedder.in_features"),
    macs=blocks_macs(
        _LINEARS, (("layers", _JOINT, _JOINT),), attrgetter("hidden_size"), chosen=("feed_forward.",), always=("norm1.linear",)
    ),
    outside_macs=_outside_macs,
    linears=_LINEARS,
)

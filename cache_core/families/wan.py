"""Wan 2.1 and 2.2: blocks of self-attention, cross-attention to text and feed-forward over one stream of video tokens.

Source: comfy/ldm/wan/model.py, model_animate.py (ComfyUI 0.3.75). Blocks return a new tensor and differ in what they look at:

- T2V (also Wan 2.2's I2V experts, which take the picture as channels) sees text alone.
- I2V sees the tokens of a CLIP picture before the text; `context_img_len` says how many, and both attentions see all where it is None.
  T2V blocks are given that number too and ignore it, so the two are families of their own.
- HuMo sees audio as well; S2V, VACE and Animate are in wan_fed.py.

Modulation is per call, or per frame where Wan 2.2 5B continues a picture; no linear layer inside the blocks takes part in it. Reference
latents add tokens before (`ref_conv`) or behind the video: forecast with it, but a calibrated forecast does not know them.
Wan 2.2's two experts are two models in two samplers: two runs, the second starting in the middle of the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from math import prod
from operator import attrgetter
from types import MappingProxyType
from typing import Any

from torch import nn

from ..kinds import Kind
from .base import Lengths, ModelFamily, Stack
from .counting import around_macs, blocks_macs, patches
from .linears import StackLinears
from .wan_blocks import RENEWED, SITES, replay, wan_linears

Beside = Callable[[nn.Module], tuple[tuple[nn.Module, Callable[..., Any]], ...]]
_NOTHING: Mapping[str, str] = MappingProxyType({})
_ATTENTION = (("blocks", "img", "img"), ("blocks", "img", "txt"))
_PLACES = MappingProxyType(
    {
        "patch_embedding": "img",
        "text_embedding": "txt",
        "time_embedding": "",
        "time_projection": "",
        "head.head": "img",
        "control_adapter": "img",
    }
)


def sees_clip(model: nn.Module) -> bool:
    """Whether the blocks look at a CLIP picture beside the text."""
    return hasattr(model.blocks[0].cross_attn, "k_img")  # type: ignore[index, union-attr]


def _text_and_clip(call: Mapping[str, Any], lengths: Lengths) -> Lengths:
    whole, clip = lengths["txt"], call.get("context_img_len")
    return {"txt": whole, "clip": whole, "picture": 0} if clip is None else {"txt": whole - clip, "clip": clip, "picture": clip}


def _audio_by_frame(_call: Mapping[str, Any], lengths: Lengths) -> Lengths:
    """Where there is audio, a frame of video looks at the 16 tokens of its own frame of it."""
    audio = lengths["audio"]
    return {"heard": min(16, audio), "frames": audio // 16, "hearing": lengths["img"] if audio else 0}


SEES_CLIP: Mapping[str, Any] = MappingProxyType(
    {"counts": _text_and_clip, "attention": (("blocks", "img", "clip"),), "places": {"img_emb": "picture"}}
)


def wan_family(
    name: str,
    matches: Callable[[Any], bool],
    contexts: Mapping[str, str] = _NOTHING,
    counts: Callable[[Mapping[str, Any], Lengths], Lengths] = lambda _call, _lengths: {},
    linears: tuple[StackLinears, ...] = (),
    attention: tuple[tuple[str, str, str], ...] = (),
    places: Mapping[str, str] = _NOTHING,
    idle: Beside = lambda _model: (),
) -> ModelFamily:
    """One of Wan's models. contexts, linears, attention, places: what it has beside those of all; idle: as ModelFamily has it."""
    own = (wan_linears("blocks"),)
    count = blocks_macs(own, (*_ATTENTION, *attention), attrgetter("dim"), chosen=RENEWED)
    count_beside = blocks_macs(linears, attention, attrgetter("dim"))

    def macs(model: nn.Module, lengths: Lengths, kind: Kind, share: float) -> float:
        """Blocks beside those of all run whole in conservative evaluations; sound is not listened to."""
        if kind is not Kind.CONSERVATIVE:
            return count(model, lengths, kind, share) + count_beside(model, lengths, kind, share)
        return count(model, {**lengths, "heard": 0}, kind, share) + count_beside(model, lengths, Kind.FULL, share)

    return ModelFamily(
        name=name,
        matches=matches,
        stacks=(
            Stack(
                path="blocks",
                parameters=("x", "e", "freqs", "context", "context_img_len", *contexts, "transformer_options"),
                streams={"x": "img"},
                contexts={"context": "txt", **contexts},
                counts=counts,
                sites=SITES,
                replay=replay,
            ),
        ),
        hidden="img",
        channels=attrgetter("dim"),
        embed="patch_embedding",
        input_channels=lambda model: int(model.in_dim) * prod(model.patch_size),  # type: ignore[arg-type]
        macs=macs,
        outside_macs=around_macs({**_PLACES, **places}),
        linears=(*own, *linears),
        tokens=patches,
        idle=idle,
    )


def _is_plain(model: nn.Module) -> bool:
    return type(model).__name__ in ("WanModel", "CameraWanModel")


WAN = wan_family("wan", lambda model: _is_plain(model) and not sees_clip(model))
WAN_I2V = wan_family("wan_i2v", lambda model: _is_plain(model) and sees_clip(model), **SEES_CLIP)
WAN_HUMO = wan_family(
    "wan_humo",
    lambda model: type(model).__name__ == "HumoWanModel",
    contexts={"audio": "audio"},
    counts=_audio_by_frame,
    attention=(("blocks", "img", "heard"),),
    places={"audio_proj": "frames"},
)

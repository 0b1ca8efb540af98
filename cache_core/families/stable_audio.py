"""Stable Audio: ungated blocks of self-attention, cross-attention to text and feed-forward over audio frames.

Source: comfy/ldm/audio/dit.py (ComfyUI 0.3.75). Time and global conditioning are a token before the frames, added behind the input layer
and cut off behind the blocks: a stream of its own, computed anew at every evaluation. The host calls the input layer only with frames.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor

from .base import Cached, Lengths, ModelFamily, Site, Stack, UnsupportedCallError
from .counting import around_macs, blocks_macs
from .linears import StackLinears, equal_parts
from .replaying import renewed

_PATH, _FRAMES = "transformer.layers", "time+audio"
_LINEARS = (
    StackLinears(
        path=_PATH,
        streams={"cross_attn.to_kv": "txt", "": _FRAMES},
        skip=("to_scale_shift_gate",),
        parts=equal_parts("self_attn.to_qkv", "qkv") | equal_parts("cross_attn.to_kv", "kv") | equal_parts("ff.ff.0.proj", "vg"),
    ),
)
_AROUND = around_macs(
    {
        "transformer.project_in": "audio",
        "transformer.project_out": _FRAMES,
        "to_timestep_embed": "",
        "to_global_embed": "",
        "to_cond_embed": "txt",
    }
)


def _outside_macs(model: Any, lengths: Lengths) -> float:
    """With the convolutions over single frames, before and behind."""
    layers = (model.preprocess_conv, model.postprocess_conv)
    return _AROUND(model, lengths) + lengths["audio"] * sum(layer.in_channels * layer.out_channels for layer in layers)


def _replay(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    """Self-attention from the cache; cross-attention and feed-forward for the chosen frames."""
    if call.get("mask") is not None or call.get("global_cond") is not None or block.conformer is not None:
        raise UnsupportedCallError("masked frames, gates, or convolutions over frames")
    text, options = call["context"], call.get("transformer_options", {})
    x = attended = call["x"] + cached.whole("self_attn")
    tokens = cached.choose(_FRAMES, x.shape[1])

    def look(at: Tensor) -> Tensor:
        return block.cross_attn(block.cross_attend_norm(attended[:, at]), context=text, transformer_options=options)

    if text is not None:
        x = x + renewed(cached, "cross_attn", tokens, look)
    return (x + renewed(cached, "ff", tokens, lambda at: block.ff(block.ff_norm(x[:, at]))),)


STABLE_AUDIO = ModelFamily(
    name="stable_audio",
    matches=lambda model: type(model).__name__ == "AudioDiffusionTransformer" and hasattr(model, "transformer"),
    stacks=(
        Stack(
            path=_PATH,
            parameters=("x", "context", "global_cond", "mask", "context_mask", "rotary_pos_emb", "transformer_options"),
            streams={"x": _FRAMES},
            contexts={"context": "txt"},
            sites=(Site("self_attn", "self_attn", _FRAMES), Site("cross_attn", "cross_attn", _FRAMES), Site("ff", "ff", _FRAMES)),
            replay=_replay,
        ),
    ),
    hidden="audio",
    channels=attrgetter("transformer.dim"),
    embed="transformer.project_in",
    input_channels=attrgetter("transformer.project_in.in_features"),
    macs=blocks_macs(
        _LINEARS, ((_PATH, _FRAMES, _FRAMES), (_PATH, _FRAMES, "txt")), attrgetter("transformer.dim"), chosen=("cross_attn.", "ff.")
    ),
    outside_macs=_outside_macs,
    linears=_LINEARS,
    measures={"transformer.project_in": "audio"},
)

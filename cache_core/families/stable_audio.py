"""Stable Audio: ungated blocks of self-attention, cross-attention to text and feed-forward over audio frames.

Source: comfy/ldm/audio/dit.py (ComfyUI 0.3.75). Time and global conditioning are a token before the frames, added behind the input layer
and cut off behind the blocks: a stream of its own, computed anew at every evaluation. The host calls the input layer only with frames.
"""

from __future__ import annotations

from operator import attrgetter

from .base import ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import StackLinears, equal_parts

_PATH = "transformer.layers"
_LINEARS = (
    StackLinears(
        path=_PATH,
        streams={"cross_attn.to_kv": "txt", "": "time+audio"},
        skip=("to_scale_shift_gate",),
        parts=equal_parts("self_attn.to_qkv", "qkv") | equal_parts("cross_attn.to_kv", "kv") | equal_parts("ff.ff.0.proj", "vg"),
    ),
)

STABLE_AUDIO = ModelFamily(
    name="stable_audio",
    matches=lambda model: type(model).__name__ == "AudioDiffusionTransformer" and hasattr(model, "transformer"),
    stacks=(
        Stack(
            path=_PATH,
            parameters=("x", "context", "global_cond", "mask", "context_mask", "rotary_pos_emb", "transformer_options"),
            streams={"x": "time+audio"},
            contexts={"context": "txt"},
        ),
    ),
    hidden="audio",
    channels=attrgetter("transformer.dim"),
    embed="transformer.project_in",
    input_channels=attrgetter("transformer.project_in.in_features"),
    macs=blocks_macs(_LINEARS, ((_PATH, "time+audio", "time+audio"), (_PATH, "time+audio", "txt")), attrgetter("transformer.dim")),
    outside_macs=around_macs(
        {
            "transformer.project_in": "audio",
            "transformer.project_out": "time+audio",
            "to_timestep_embed": "",
            "to_global_embed": "",
            "to_cond_embed": "txt",
        }
    ),
    linears=_LINEARS,
    measures={"transformer.project_in": "audio"},
)

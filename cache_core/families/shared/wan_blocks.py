"""Replays Wan's block of self-attention, cross-attention, audio attention (in HuMo only) and MLP.

Source: comfy/ldm/wan/model.py (ComfyUI 0.3.75). A block computes x += gate·self_attn, x += cross_attn, x += audio attention, x += gate·ffn.
HuMo's audio attention pairs tokens with the sound of their frame by dividing all tokens evenly among the frames, so it cannot be computed
for chosen tokens alone: like self-attention it is taken from the cache as it is. The vectors `e` are (B, 6, C), or (B, T, 6, C) where one
serves a frame or another run of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Cached, Site, modulate
from .replaying import renewed
from .video_blocks import CROSS, MLP, SELF, sites, spread

_AUDIO = "hearing.cross_attn"  # a stream name of its own: img.cross_attn is the key of cross-attention to text
SITES = (*sites("self_attn", "cross_attn", "ffn"), Site("cross_attn", "audio_cross_attn_wrapper.audio_cross_attn", "hearing"))


def replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    """Takes self-attention and audio attention from the cache and recomputes cross-attention and MLP for the chosen tokens."""
    x, e = arguments["x"], arguments["e"]
    table = block.modulation.to(dtype=x.dtype, device=x.device)  # the host's own cast of this raw parameter
    vectors = (table + e).chunk(6, dim=1) if e.ndim < 4 else (table.unsqueeze(0) + e).unbind(2)
    _, _, gate_attn, shift, scale, gate = vectors
    length, seen = x.shape[1], {name: arguments[name] for name in ("context_img_len", "transformer_options") if name in arguments}
    tokens = cached.choose("img", length)

    def feed_forward(at: Tensor) -> Tensor:
        return block.ffn(modulate(block.norm2(x[:, at]), spread(shift, length, at), spread(scale, length, at)))

    x = torch.addcmul(x, cached.all_tokens(SELF), spread(gate_attn, length))
    x = x + renewed(cached, CROSS, tokens, lambda at: block.cross_attn(block.norm3(x[:, at]), arguments["context"], **seen))
    if arguments.get("audio") is not None:
        x = x + cached.all_tokens(_AUDIO)
    return (torch.addcmul(x, renewed(cached, MLP, tokens, feed_forward), spread(gate, length)),)

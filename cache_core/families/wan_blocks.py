"""Wan's block of self-attention, cross-attention, in HuMo audio attention, and feed-forward: its conservative evaluation.

Source: comfy/ldm/wan/model.py (ComfyUI 0.3.75). x += gate·self_attn, x += cross_attn, x += audio attention, x += gate·ffn. HuMo's audio
attention pairs the tokens of every frame with that frame's sound by their number, so there is none for chosen tokens: it stays as it was
kept, like self-attention. The vectors `e` are (B, 6, C), or (B, T, 6, C) where a vector serves a frame or another run of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .base import Cached, Site, modulate
from .replaying import renewed
from .video_blocks import CROSS, MLP, SELF, sites, spread

_AUDIO = "hearing.cross_attn"
SITES = (*sites("self_attn", "cross_attn", "ffn"), Site("cross_attn", "audio_cross_attn_wrapper.audio_cross_attn", "hearing"))


def replay(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    x, e = call["x"], call["e"]
    table = block.modulation.to(dtype=x.dtype, device=x.device)  # the host's own cast of this raw parameter
    vectors = (table + e).chunk(6, dim=1) if e.ndim < 4 else (table.unsqueeze(0) + e).unbind(2)
    _, _, gate_attn, shift, scale, gate = vectors
    length, seen = x.shape[1], {name: call[name] for name in ("context_img_len", "transformer_options") if name in call}
    tokens = cached.choose("img", length)

    def feed_forward(at: Tensor) -> Tensor:
        return block.ffn(modulate(block.norm2(x[:, at]), spread(shift, length, at), spread(scale, length, at)))

    x = torch.addcmul(x, cached.all_tokens(SELF), spread(gate_attn, length))
    x = x + renewed(cached, CROSS, tokens, lambda at: block.cross_attn(block.norm3(x[:, at]), call["context"], **seen))
    if call.get("audio") is not None:
        x = x + cached.all_tokens(_AUDIO)
    return (torch.addcmul(x, renewed(cached, MLP, tokens, feed_forward), spread(gate, length)),)

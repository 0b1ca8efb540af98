"""LTX-Video: blocks of self-attention, cross-attention to text and MLP over one stream of video tokens.

Source: comfy/ldm/lightricks/model.py (ComfyUI 0.3.75). A block writes into its input and returns it. It computes x += gate·attn1,
x += attn2 (no gate), x += gate·ff, with norms that are functions instead of modules. Key frames are frames of the latent like any other.
Modulation is per token where there are key frames or where a given picture is continued. In newer hosts blocks may also modulate attn2;
such blocks have no conservative evaluation. The LTXVImageModel of newer hosts is this network too: it was read from source and tested on
a stand-in, not on the host itself. LTX-2 (LTXAVModel, video and audio together) has another structure.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor

from ..refusals import UnsupportedCallError
from .shared.base import Cached, ModelFamily, Stack
from .shared.replaying import renewed
from .shared.video_blocks import CROSS, MLP, SELF, sites, spread


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    x, timestep, raw = arguments["x"], arguments["timestep"], block.scale_shift_table
    if getattr(block, "cross_attention_adaln", False):
        raise UnsupportedCallError("blocks with modulated cross-attention cannot be replayed")
    table = raw[None, None].to(device=x.device, dtype=x.dtype)  # the host's own cast of this raw parameter
    vectors = table + rearrange(timestep, "B G (vectors C) -> B G vectors C", vectors=raw.shape[0])
    _, _, gate_attn, shift, scale, gate = vectors.unbind(2)
    length, seen = x.shape[1], {"context": arguments["context"], "mask": arguments.get("attention_mask")}
    tokens = cached.choose("img", length)

    def feed_forward(at: Tensor) -> Tensor:
        y = F.rms_norm(x[:, at], x.shape[-1:], eps=1e-6)
        return block.ff(torch.addcmul(y, y, spread(scale, length, at)) + spread(shift, length, at))

    x = torch.addcmul(x, cached.all_tokens(SELF), spread(gate_attn, length))
    options = arguments.get("transformer_options", {})
    x = x + renewed(cached, CROSS, tokens, lambda at: block.attn2(x[:, at], **seen, transformer_options=options))
    return (torch.addcmul(x, renewed(cached, MLP, tokens, feed_forward), spread(gate, length)),)


LTXV = ModelFamily(
    name="ltxv",
    matches=lambda model: type(model).__name__ in ("LTXVModel", "LTXVImageModel") and hasattr(model, "transformer_blocks"),
    stacks=(
        Stack(
            path="transformer_blocks",
            parameters=("x", "context", "attention_mask", "timestep", "pe", "transformer_options"),
            streams={"x": "img"},
            sites=sites("attn1", "attn2", "ff"),
            replay=_replay,
        ),
    ),
    embed="patchify_proj",
)

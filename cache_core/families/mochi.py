"""Mochi: blocks with separate video and text streams of different widths, and attention over video and text joined in this order.

Source: comfy/ldm/genmo/joint_model/asymm_models_joint.py (ComfyUI 0.3.75). A block computes x += tanh(gate)·norm(attn), then
x += tanh(gate)·norm(mlp) in both streams, with norms that are functions instead of modules. The last block does not update the text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from operator import attrgetter
from typing import Any

import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor, nn

from .shared.base import Cached, ModelFamily, Stack
from .shared.fused import equal_parts
from .shared.patches import patches
from .shared.replaying import renewed, stream_sites

_FUSED = equal_parts("attn.qkv_x", "qkv") | equal_parts("attn.qkv_y", "qkv") | equal_parts("mlp_x.w1", "vg") | equal_parts("mlp_y.w1", "vg")


def _patches(embed: nn.Module, given: Tensor) -> Tensor:
    """Returns the patches (B, T·L, d) of a video (B, C, T, H, W), frame by frame as the embedding cuts them."""
    frames = rearrange(given, "B C T H W -> (B T) C H W")
    return rearrange(patches(embed, frames), "(B T) L d -> B (T L) d", B=given.shape[0])


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor, Tensor]:
    c = F.silu(arguments["c"])
    x = _refreshed("img", arguments["x"], block.mod_x(c), block.mlp_x, cached)
    y = _refreshed("txt", arguments["y"], block.mod_y(c), block.mlp_y, cached) if block.update_y else arguments["y"]
    return x, y


def _refreshed(stream: str, x: Tensor, vectors: Tensor, mlp: Callable[[Tensor], Tensor], cached: Cached) -> Tensor:
    """Returns one stream x (B, L, C), given its modulation `vectors` (B, 4·C): attention from the cache, the MLP for the chosen tokens."""
    _, gate_attn, scale, gate_mlp = vectors.unsqueeze(1).chunk(4, dim=-1)
    x = x + _norm(cached.all_tokens(f"{stream}.attn")) * gate_attn.tanh()
    tokens = cached.choose(stream, x.shape[1])
    fresh = renewed(cached, f"{stream}.mlp", tokens, lambda at: mlp(_norm(x[:, at]) * (1 + scale)))
    return x + _norm(fresh) * gate_mlp.tanh()


def _norm(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=1e-6)


# The text stream is narrower than the video. In the last block the text's attention output is as wide as the video; it is not used.
_TEXT_SITES = tuple(replace(site, width=attrgetter("hidden_size_y")) for site in stream_sites("txt", "attn.proj_y", "mlp_y"))

MOCHI = ModelFamily(
    name="mochi",
    matches=lambda model: type(model).__name__ == "AsymmDiTJoint" and hasattr(model, "blocks"),
    stacks=(
        Stack(
            path="blocks",
            parameters=("x", "c", "y", "transformer_options"),
            streams={"x": "img", "y": "txt"},
            sites=(*stream_sites("img", "attn.proj_x", "mlp_x"), *_TEXT_SITES),
            replay=_replay,
        ),
    ),
    embed="x_embedder",
    tokens=_patches,
    fused={"blocks": _FUSED},
)

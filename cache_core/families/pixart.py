"""PixArt-alpha and PixArt-Sigma: one stream of image tokens, text by cross-attention. DuCa's paper uses this family.

Sources: comfy/ldm/pixart/pixartms.py (ComfyUI 0.3.75), and `PixArt` (of fixed size, called without HW) and `PixArtMS` of the public
ExtraModels pack, which have the same modules in plain torch layers. A block computes x += gate·attn, x += cross_attn (no gate),
x += gate·mlp. Shifts, scales and gates are the block's scale_shift_table plus one projection of the time that all blocks share. The texts
of all batch rows come in one row, (1, B·L, C).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor, nn

from .shared.base import Cached, ModelFamily, Stack
from .shared.fused import equal_parts
from .shared.patches import patches
from .shared.replaying import renewed
from .shared.video_blocks import CROSS, MLP, SELF, sites


def _is_pixart(model: nn.Module) -> bool:
    if type(model).__name__ not in ("PixArt", "PixArtMS") or not len(getattr(model, "blocks", ())):
        return False
    block = model.blocks[0]  # type: ignore[index]
    return all(hasattr(block, name) for name in ("attn", "cross_attn", "mlp", "norm2", "scale_shift_table"))


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    """Takes self-attention from the cache and recomputes cross-attention and MLP for the chosen tokens, as DuCa's PixArt does."""
    x, t = arguments["x"], arguments["t"]
    table = block.scale_shift_table[None].to(dtype=x.dtype, device=x.device)  # the host's own cast of this raw parameter
    _, _, gate_attn, shift, scale, gate_mlp = (table + rearrange(t, "B (six C) -> B six C", six=6)).chunk(6, dim=1)
    tokens = cached.choose("img", x.shape[1])
    attended = x + gate_attn * cached.all_tokens(SELF)
    x = attended + renewed(cached, CROSS, tokens, lambda at: block.cross_attn(attended[:, at], arguments["y"], arguments.get("mask")))
    return (x + gate_mlp * renewed(cached, MLP, tokens, lambda at: block.mlp(block.norm2(x[:, at]) * (1 + scale) + shift)),)


PIXART = ModelFamily(
    name="pixart",
    matches=_is_pixart,
    stacks=(
        Stack(
            path="blocks",
            parameters=("x", "y", "t", "mask", "HW"),
            streams={"x": "img"},
            sites=sites("attn", "cross_attn", "mlp"),
            replay=_replay,
        ),
    ),
    embed="x_embedder.proj",
    tokens=patches,
    fused={"blocks": equal_parts("attn.qkv", "qkv")},
)

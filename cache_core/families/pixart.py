"""PixArt-alpha and PixArt-Sigma: one stream of image tokens, text by cross-attention. The family of DuCa's own paper.

Sources: comfy/ldm/pixart/pixartms.py (ComfyUI 0.3.75), and `PixArt` (of fixed size, called without HW) and `PixArtMS` of the public
ExtraModels pack, which have the same modules in plain torch layers. x += gate·attn, x += cross_attn (no gate), x += gate·mlp; shifts,
scales and gates are the block's scale_shift_table plus one projection of the time that all blocks share. Traps: the text of all rows
comes flattened to (1, B·L, C), so its layer is left to the host in calibrated evaluations (it answers the same in every step anyway); the
model drops transformer_options, so nothing but overrides reaches a block.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..kinds import Kind
from .base import Cached, Lengths, ModelFamily, Site, Stack, linear_weights
from .counting import around_macs, patch_channels, patches
from .linears import StackLinears, equal_parts

_width = attrgetter("x_embedder.proj.out_channels")  # not every one of these classes has a hidden_size


def _is_pixart(model: nn.Module) -> bool:
    if type(model).__name__ not in ("PixArt", "PixArtMS") or not len(getattr(model, "blocks", ())):
        return False
    block = model.blocks[0]  # type: ignore[index]
    return all(hasattr(block, name) for name in ("attn", "cross_attn", "mlp", "norm2", "scale_shift_table"))


def _replay(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    """Self-attention from the cache; cross-attention and MLP recomputed for the chosen tokens, as DuCa's PixArt does."""
    x, t = call["x"], call["t"]
    table = block.scale_shift_table[None].to(dtype=x.dtype, device=x.device)  # the host's own cast of this raw parameter
    _, _, gate_attn, shift, scale, gate_mlp = (table + t.reshape(x.shape[0], 6, -1)).chunk(6, dim=1)
    tokens = cached.choose("img", x.shape[1])
    x = x + gate_attn * cached.whole("attn")
    if tokens is None:
        return (x + cached.whole("cross_attn") + gate_mlp * cached.whole("mlp"),)
    x = x + cached.refreshed("cross_attn", tokens, block.cross_attn(x[:, tokens], call["y"], call.get("mask")))
    fresh = block.mlp(block.norm2(x[:, tokens]) * (1 + scale) + shift)
    return (x + gate_mlp * cached.refreshed("mlp", tokens, fresh),)


def _macs(model: Any, lengths: Lengths, kind: Kind, share: float) -> float:
    """Multiply-adds of all blocks for one batch row."""
    if kind is Kind.AGGRESSIVE or (kind is Kind.CONSERVATIVE and share == 0):
        return 0.0
    img, txt = lengths["img"], lengths["txt"]
    total = 0.0
    for block in model.blocks:
        cross, products = block.cross_attn, 2 * _width(model)
        per_token = linear_weights(cross.q_linear, cross.proj, block.mlp) + products * txt
        total += share * img * per_token if kind is Kind.CONSERVATIVE else img * per_token
        total += txt * linear_weights(cross.kv_linear)
        if kind is Kind.FULL:
            total += img * linear_weights(block.attn) + products * img * img
    return total


PIXART = ModelFamily(
    name="pixart",
    matches=_is_pixart,
    stacks=(
        Stack(
            path="blocks",
            parameters=("x", "y", "t", "mask", "HW"),
            streams={"x": "img"},
            contexts={"y": "txt"},
            counts=lambda call, _lengths: {"txt": call["y"].shape[0] * call["y"].shape[1] // call["x"].shape[0]},
            sites=(Site("attn", "attn", "img"), Site("cross_attn", "cross_attn", "img"), Site("mlp", "mlp", "img")),
            replay=_replay,
        ),
    ),
    hidden="img",
    channels=_width,
    embed="x_embedder.proj",
    input_channels=lambda model: patch_channels(attrgetter("x_embedder.proj")(model)),
    tokens=patches,
    macs=_macs,
    outside_macs=around_macs(
        {
            "x_embedder": "img",
            "y_embedder": "txt",
            "t_embedder": "",
            "t_block": "",
            "csize_embedder": "",
            "ar_embedder": "",
            "final_layer": "img",
        }
    ),
    linears=(StackLinears(path="blocks", streams={"": "img"}, skip=("cross_attn.kv_linear",), parts=equal_parts("attn.qkv", "qkv")),),
)

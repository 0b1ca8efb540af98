"""Blocks of FLUX.1, which other models have adopted: double blocks with an image and a text stream, then fused single blocks over both.

Source: comfy/ldm/flux/layers.py (ComfyUI 0.3.75). A double block adds gate·attn and gate·mlp to each stream. A single block adds
gate·linear2([attn, mlp]) to the joint stream. Both write in place. Shift, scale and gate are made by a modulation in the block; a block
without one (FLUX.2, Chroma) is given them ready-made as `vec`. Where there are several rows of them (HunyuanVideo's guiding frame),
modulation_dims [(start, end, row), …] say which row each token takes. The host adds ControlNet residuals after each block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ...refusals import UnsupportedCallError
from .base import Cached, ModelFamily, Site, Stack, modulate
from .flux_fused import FLUX_FUSED
from .replaying import finite, renewed, stream_sites


def has_flux_blocks(model: nn.Module, class_name: str, own_modulation: bool) -> bool:
    """Returns whether a network is of the class `class_name` and has the attributes that this file uses.

    Args:
        model: The network.
        class_name: Name of its class.
        own_modulation: Whether every double block must make its shifts, scales and gates itself, or must not.
    """
    if type(model).__name__ != class_name or not len(getattr(model, "double_blocks", ())) or not hasattr(model, "single_blocks"):
        return False
    block = model.double_blocks[0]  # type: ignore[index]
    has_streams = all(hasattr(block, name) for name in ("img_attn", "txt_attn", "img_mlp", "txt_mlp"))
    return has_streams and hasattr(block, "img_mod") == hasattr(block, "txt_mod") == own_modulation


def flux_like(
    name: str,
    matches: Callable[[nn.Module], bool],
    joint: str = "txt+img",
    embed: str = "img_in",
    tokens: Callable[[nn.Module, Tensor], Tensor] = lambda _module, given: given,
) -> ModelFamily:
    """Returns a family with FLUX's blocks.

    Args:
        name: As in `ModelFamily`.
        matches: As in `ModelFamily`.
        joint: Name of the single blocks' stream, "txt+img" or "img+txt".
        embed: As in `ModelFamily`.
        tokens: As in `ModelFamily`.
    """
    return ModelFamily(name, matches, _stacks(joint), embed=embed, tokens=tokens, fused=FLUX_FUSED)


def _stacks(joint: str) -> tuple[Stack, Stack]:
    double = Stack(
        path="double_blocks",
        parameters=("img", "txt", "vec", "pe", "attn_mask", "modulation_dims_img", "modulation_dims_txt"),
        streams={"img": "img", "txt": "txt"},
        sites=(
            *stream_sites("img", "img_attn.proj", "img_mlp"),
            *stream_sites("txt", "txt_attn.proj", "txt_mlp"),
        ),
        replay=_replay_double,
    )
    single = Stack(
        path="single_blocks",
        parameters=("x", "vec", "pe", "attn_mask", "modulation_dims"),
        streams={"x": joint},
        sites=(
            Site("attn", "linear2", joint, source="input", width=attrgetter("hidden_size")),
            Site("output", "linear2", joint),
        ),
        replay=partial(_replay_single, joint),
    )
    return double, single


def _replay_double(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor, Tensor]:
    vec = arguments["vec"]
    img_mods, txt_mods = (block.img_mod(vec), block.txt_mod(vec)) if hasattr(block, "img_mod") else vec
    img = _refresh_stream(block, "img", arguments["img"], img_mods, arguments.get("modulation_dims_img"), cached)
    txt = _refresh_stream(block, "txt", arguments["txt"], txt_mods, arguments.get("modulation_dims_txt"), cached)
    return img, finite(txt)


def _refresh_stream(block: Any, name: str, x: Tensor, mods: Any, dims: Any, cached: Cached) -> Tensor:
    """Returns one stream x (B, L, C) of a double block: attention from the cache, the MLP recomputed for the chosen tokens."""
    (attn_mod, mlp_mod), rows = mods, _rows(dims, x)
    x = x + _taken(attn_mod.gate, rows) * cached.all_tokens(f"{name}.attn")
    tokens = cached.choose(name, x.shape[1])

    def feed_forward(at: Tensor) -> Tensor:
        norm, layer = getattr(block, f"{name}_norm2"), getattr(block, f"{name}_mlp")
        return layer(_modulated(norm(x[:, at]), mlp_mod, rows, at))

    return x + _taken(mlp_mod.gate, rows) * renewed(cached, f"{name}.mlp", tokens, feed_forward)


def _replay_single(joint: str, block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    if getattr(block, "yak_mlp", False):
        raise UnsupportedCallError("blocks with a gated MLP inside linear1, as in Ovis, cannot be replayed")
    x = arguments["x"]
    mod = arguments["vec"] if block.modulation is None else block.modulation(arguments["vec"])[0]
    rows = _rows(arguments.get("modulation_dims"), x)
    tokens = cached.choose(joint, x.shape[1])

    def fresh(at: Tensor) -> Tensor:
        # linear1 is fused: it also computes q, k and v of the chosen tokens, which are dropped (weights are never sliced)
        projected = block.linear1(_modulated(block.pre_norm(x[:, at]), mod, rows, at))
        mlp = block.mlp_act(projected[..., 3 * block.hidden_size :])
        return block.linear2(torch.cat((cached.some_tokens(f"{joint}.attn", at), mlp), dim=-1))

    return (finite(x + _taken(mod.gate, rows) * renewed(cached, f"{joint}.output", tokens, fresh)),)


def _rows(dims: Any, x: Tensor) -> Tensor | None:
    """Returns which row of shifts, scales and gates each token of x (B, L, C) takes, (L,); None where there is only one row."""
    if dims is None:
        return None
    rows, times = torch.zeros(2, x.shape[1], dtype=torch.long)
    for start, end, row in dims:
        rows[start:end] = row
        times[start:end] += 1
    if (times != 1).any():
        raise UnsupportedCallError("modulation_dims do not give each token exactly one row")
    return rows.to(x.device, non_blocking=True)


def _taken(vectors: Tensor, rows: Tensor | None) -> Tensor:
    """Returns the vectors (B, rows, C) that the tokens take: (B, L, C), or (B, 1, C) where all take the same."""
    return vectors if rows is None else vectors[:, rows]


def _modulated(x: Tensor, mod: Any, rows: Tensor | None, tokens: Tensor) -> Tensor:
    """Returns the chosen tokens x (B, k, C), shifted and scaled."""
    rows = None if rows is None else rows[tokens]
    return modulate(x, _taken(mod.shift, rows), _taken(mod.scale, rows))

"""FLUX.1: double blocks with separate image and text streams, then fused single blocks over both.

Source: comfy/ldm/flux (ComfyUI 0.3.75). A double block adds gate·attn and gate·mlp to each stream; a single
block adds gate·linear2([attn, mlp]) to the joint one. The order of joint tokens is text, image; reference
latents (Kontext) follow the image inside the image stream. The host adds ControlNet residuals after each block.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..kinds import Kind
from .base import Cached, Lengths, ModelFamily, Site, Stack, UnsupportedCallError, linear_weights, modulate
from .flux_linears import FLUX_LINEARS


def _is_flux(model: nn.Module) -> bool:
    """Class name and the attributes used here; per-block modulation tells FLUX.1 from FLUX.2 and Chroma."""
    if type(model).__name__ != "Flux" or not len(getattr(model, "double_blocks", ())) or not hasattr(model, "single_blocks"):
        return False
    block = model.double_blocks[0]  # type: ignore[index]
    return all(hasattr(block, name) for name in ("img_mod", "txt_mod", "img_attn", "txt_attn", "img_mlp", "txt_mlp"))


def _refresh_stream(block: nn.Module, name: str, x: Tensor, attn_gate: Tensor, mlp_mod: Any, cached: Cached) -> Tensor:
    """One stream of a double block: cached attention, MLP recomputed for the chosen tokens. x (B, L, C)."""
    x = x + attn_gate * cached.whole(f"{name}_attn")
    tokens = cached.choose(name, x.shape[1])
    if tokens is None:
        mlp = cached.whole(f"{name}_mlp")
    else:
        norm, layer = getattr(block, f"{name}_norm2"), getattr(block, f"{name}_mlp")
        fresh = layer(modulate(norm(x[:, tokens]), mlp_mod.shift, mlp_mod.scale))
        mlp = cached.refreshed(f"{name}_mlp", tokens, fresh)
    return x + mlp_mod.gate * mlp


def _replay_double(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor, Tensor]:
    if call.get("modulation_dims_img") is not None or call.get("modulation_dims_txt") is not None:
        raise UnsupportedCallError("per-token modulation")
    img_mod1, img_mod2 = block.img_mod(call["vec"])
    txt_mod1, txt_mod2 = block.txt_mod(call["vec"])
    img = _refresh_stream(block, "img", call["img"], img_mod1.gate, img_mod2, cached)
    txt = _refresh_stream(block, "txt", call["txt"], txt_mod1.gate, txt_mod2, cached)
    return img, _finite(txt)


def _replay_single(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    if call.get("modulation_dims") is not None:
        raise UnsupportedCallError("per-token modulation")
    x = call["x"]
    mod, _ = block.modulation(call["vec"])
    tokens = cached.choose("txt+img", x.shape[1])
    if tokens is None:
        output = cached.whole("output")
    else:
        # linear1 is fused: its q, k and v of the chosen tokens are computed too and dropped (weights are never sliced)
        projected = block.linear1(modulate(block.pre_norm(x[:, tokens]), mod.shift, mod.scale))
        mlp = block.mlp_act(projected[..., 3 * block.hidden_size :])
        fresh = block.linear2(torch.cat((cached.chosen("attn", tokens), mlp), dim=-1))
        output = cached.refreshed("output", tokens, fresh)
    return (_finite(x + mod.gate * output),)


def _finite(x: Tensor) -> Tensor:
    """float16 can overflow in deep blocks; the host clips there too."""
    return torch.nan_to_num(x, nan=0.0, posinf=65504, neginf=-65504) if x.dtype == torch.float16 else x


def _macs(model: Any, lengths: Lengths, kind: Kind, share: float) -> float:
    """Multiply-adds of all blocks for one batch row."""
    if kind is Kind.AGGRESSIVE:
        return 0.0
    img, txt = lengths["img"], lengths["txt"]
    joint = img + txt
    total = 0.0
    for block in model.double_blocks:
        total += linear_weights(block.img_mod, block.txt_mod)
        if kind is Kind.FULL:
            total += img * linear_weights(block.img_attn, block.img_mlp) + txt * linear_weights(block.txt_attn, block.txt_mlp)
            total += 2 * joint * joint * block.hidden_size
        else:
            total += share * (img * linear_weights(block.img_mlp) + txt * linear_weights(block.txt_mlp))
    for block in model.single_blocks:
        per_token = joint * linear_weights(block.linear1, block.linear2)
        total += linear_weights(block.modulation)
        total += per_token + 2 * joint * joint * block.hidden_size if kind is Kind.FULL else share * per_token
    return total


def _outside_macs(model: Any, lengths: Lengths) -> float:
    """Embedding and final layer of one batch row."""
    vectors = linear_weights(model.time_in, model.vector_in, model.guidance_in, model.final_layer.adaLN_modulation)
    tokens = lengths["img"] * linear_weights(model.img_in, model.final_layer.linear) + lengths["txt"] * linear_weights(model.txt_in)
    return vectors + tokens


FLUX = ModelFamily(
    name="flux",
    matches=_is_flux,
    stacks=(
        Stack(
            path="double_blocks",
            parameters=("img", "txt", "vec", "pe", "attn_mask", "modulation_dims_img", "modulation_dims_txt"),
            streams={"img": "img", "txt": "txt"},
            sites=(
                Site("img_attn", "img_attn.proj", "img"),
                Site("txt_attn", "txt_attn.proj", "txt"),
                Site("img_mlp", "img_mlp", "img"),
                Site("txt_mlp", "txt_mlp", "txt"),
            ),
            replay=_replay_double,
        ),
        Stack(
            path="single_blocks",
            parameters=("x", "vec", "pe", "attn_mask", "modulation_dims"),
            streams={"x": "txt+img"},
            sites=(
                Site("attn", "linear2", "txt+img", source="input", width=attrgetter("hidden_size")),
                Site("output", "linear2", "txt+img"),
            ),
            replay=_replay_single,
        ),
    ),
    hidden="img",
    channels=attrgetter("hidden_size"),
    embed="img_in",
    input_channels=attrgetter("in_channels"),
    macs=_macs,
    outside_macs=_outside_macs,
    linears=FLUX_LINEARS,
)

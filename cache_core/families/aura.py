"""AuraFlow: double blocks with separate text and image streams, then single blocks over text and image joined in this order.

Source: comfy/ldm/aura/mmdit.py (ComfyUI 0.3.75). A block normalises x + gate·attn again and adds only the gated MLP of the result to x,
so attention and MLP are not two terms of one sum. The MLP of a token still needs the attention output of that token alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from .shared.base import Cached, ModelFamily, Stack, modulate
from .shared.replaying import renewed, stream_sites


def _is_aura(model: nn.Module) -> bool:
    """Tells AuraFlow from SD3 by its lists of blocks: a class of either may be named MMDiT."""
    return type(model).__name__ == "MMDiT" and all(len(getattr(model, name, ())) for name in ("double_layers", "single_layers"))


def _replay_double(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor, Tensor]:
    txt_mods, img_mods = (mod(arguments["global_cond"])[:, None].chunk(6, dim=-1) for mod in (block.modC, block.modX))
    txt = _renormalised(cached, "txt", arguments["c"], txt_mods, block.normC2, block.mlpC)
    return txt, _renormalised(cached, "img", arguments["x"], img_mods, block.normX2, block.mlpX)


def _replay_single(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    modulation = block.modCX(arguments["global_cond"])[:, None].chunk(6, dim=-1)
    return (_renormalised(cached, "txt+img", arguments["cx"], modulation, block.norm2, block.mlp),)


def _renormalised(cached: Cached, stream: str, x: Tensor, modulation: Sequence[Tensor], norm: Any, mlp: Any) -> Tensor:
    """Returns one stream, x + gate·mlp(norm(x + gate·attn)·(1 + scale) + shift), with x of shape (B, L, C)."""
    _, _, gate_attn, shift, scale, gate_mlp = modulation

    def fresh(at: Tensor) -> Tensor:
        attended = x[:, at] + gate_attn * cached.some_tokens(f"{stream}.attn", at)
        return mlp(modulate(norm(attended), shift, scale))

    return x + gate_mlp * renewed(cached, f"{stream}.mlp", cached.choose(stream, x.shape[1]), fresh)


AURA = ModelFamily(
    name="aura",
    matches=_is_aura,
    stacks=(
        Stack(
            path="double_layers",
            parameters=("c", "x", "global_cond"),
            streams={"c": "txt", "x": "img"},
            sites=(*stream_sites("txt", "attn.w1o", "mlpC"), *stream_sites("img", "attn.w2o", "mlpX")),
            replay=_replay_double,
        ),
        Stack(
            path="single_layers",
            parameters=("cx", "global_cond"),
            streams={"cx": "txt+img"},
            sites=stream_sites("txt+img", "attn.w1o", "mlp"),
            replay=_replay_single,
        ),
    ),
    embed="init_x_linear",
)

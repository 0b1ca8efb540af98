"""Class-conditional DiT (Peebles & Xie): one stream of image tokens, no text. The first benchmark of the papers on DuCa and ICC.

Sources: nodes/dit/network.py, and the `DiT` of the public ExtraModels pack, which has the same modules in plain torch layers and calls its
blocks with (x, c) only. x += gate·attn, x += gate·mlp; each block makes shifts, scales and gates from c = time + class, one vector a row.
Places are added before the blocks, so that chosen tokens need no positions of their own.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from .base import Cached, ModelFamily, Stack
from .counting import around_macs, blocks_macs, patch_channels, patches
from .linears import StackLinears, equal_parts
from .replaying import gated, stream_sites

_width = attrgetter("x_embedder.proj.out_channels")


def _is_dit(model: nn.Module) -> bool:
    if type(model).__name__ != "DiT" or not len(getattr(model, "blocks", ())) or not hasattr(model, "y_embedder"):
        return False
    block = model.blocks[0]  # type: ignore[index]
    has_parts = all(hasattr(block, name) for name in ("attn", "mlp", "norm2", "adaLN_modulation"))
    return has_parts and not hasattr(block, "cross_attn") and hasattr(model.y_embedder, "embedding_table")


def _replay(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    """Attention from the cache, the MLP recomputed for the chosen tokens."""
    modulation = block.adaLN_modulation(call["c"])[:, None].chunk(6, dim=-1)
    return (gated(cached, "img", call["x"], modulation, block.norm2, block.mlp),)


_LINEARS = (StackLinears(path="blocks", streams={"": "img"}, skip=("adaLN_modulation.",), parts=equal_parts("attn.qkv", "qkv")),)
DIT = ModelFamily(
    name="dit",
    matches=_is_dit,
    stacks=(
        Stack(
            path="blocks",
            parameters=("x", "c"),
            streams={"x": "img"},
            sites=stream_sites("img", "attn", "mlp"),
            replay=_replay,
        ),
    ),
    hidden="img",
    channels=_width,
    embed="x_embedder.proj",
    input_channels=lambda model: patch_channels(attrgetter("x_embedder.proj")(model)),
    tokens=patches,
    macs=blocks_macs(_LINEARS, (("blocks", "img", "img"),), _width, chosen=("mlp.",), always=("adaLN_modulation.",)),
    outside_macs=around_macs({"x_embedder": "img", "t_embedder": "", "final_layer.linear": "img", "final_layer.adaLN_modulation": ""}),
    linears=_LINEARS,
)

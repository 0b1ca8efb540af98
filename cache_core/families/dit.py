"""Class-conditional DiT (Peebles & Xie): one stream of image tokens, no text. The papers on DuCa and ICC benchmark this model first.

Sources: nodes/dit/network.py, and the `DiT` of the public ExtraModels pack, which has the same modules in plain torch layers and calls its
blocks with (x, c) only. A block computes x += gate·attn, then x += gate·mlp. It makes shifts, scales and gates from c = time + class, one
vector per batch row. Position embeddings are added before the blocks, so recomputing chosen tokens needs no positions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .shared.base import Cached, ModelFamily, Stack
from .shared.fused import equal_parts
from .shared.patches import patches
from .shared.replaying import gated, stream_sites


def _is_dit(model: nn.Module) -> bool:
    if type(model).__name__ != "DiT" or not len(getattr(model, "blocks", ())) or not hasattr(model, "y_embedder"):
        return False
    block = model.blocks[0]  # type: ignore[index]
    has_parts = all(hasattr(block, name) for name in ("attn", "mlp", "norm2", "adaLN_modulation"))
    return has_parts and not hasattr(block, "cross_attn") and hasattr(model.y_embedder, "embedding_table")


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    """Takes attention from the cache and recomputes the MLP for the chosen tokens."""
    modulation = block.adaLN_modulation(arguments["c"])[:, None].chunk(6, dim=-1)
    return (gated(cached, "img", arguments["x"], modulation, block.norm2, block.mlp),)


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
    embed="x_embedder.proj",
    tokens=patches,
    fused={"blocks": equal_parts("attn.qkv", "qkv")},
)

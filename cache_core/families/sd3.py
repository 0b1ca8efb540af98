"""Stable Diffusion 3 and 3.5: joint blocks of a text and an image half, with attention over text and image joined in this order.

Source: comfy/ldm/modules/diffusionmodules/mmdit.py (ComfyUI 0.3.75). The text half of the last block ends with its keys and values, and
that block returns None for text. In SD3.5-medium the image half of some blocks has a second attention, over the image alone (attn2).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from ..refusals import UnsupportedCallError
from .shared.base import Cached, ModelFamily, Site, Stack
from .shared.fused import equal_parts
from .shared.patches import patches
from .shared.replaying import gated, stream_sites


def _is_sd3(model: nn.Module) -> bool:
    """Tells SD3 from AuraFlow by its list of blocks: a class of either may be named MMDiT."""
    if type(model).__name__ not in ("OpenAISignatureMMDITWrapper", "MMDiT") or not len(getattr(model, "joint_blocks", ())):
        return False
    return all(hasattr(model.joint_blocks[0], name) for name in ("context_block", "x_block"))  # type: ignore[index]


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Any, Tensor]:
    """Takes all attention from the cache. The host computes a joint block in a function, so the modules of both halves are called here."""
    txt = None if block.context_block.pre_only else _half(block.context_block, "txt", arguments["context"], arguments["c"], cached)
    return txt, _half(block.x_block, "img", arguments["x"], arguments["c"], cached)


def _half(block: Any, stream: str, x: Tensor, c: Tensor, cached: Cached) -> Tensor:
    """Returns the stream x (B, L, C) of the text or the image half of a block, given the embedded time c (B, C)."""
    if block.scale_mod_only:
        raise UnsupportedCallError("blocks without shifts cannot be replayed")
    modulation = block.adaLN_modulation(c)[:, None].chunk(9 if block.x_block_self_attn else 6, dim=-1)
    if block.x_block_self_attn:
        x = x + modulation[8] * cached.all_tokens("img.attn2")
    return gated(cached, stream, x, modulation[:6], block.norm2, block.mlp)


SD3 = ModelFamily(
    name="sd3",
    matches=_is_sd3,
    stacks=(
        Stack(
            path="joint_blocks",
            parameters=("context", "x"),
            streams={"context": "txt", "x": "img"},
            sites=(
                *stream_sites("txt", "context_block.attn.proj", "context_block.mlp"),
                *stream_sites("img", "x_block.attn.proj", "x_block.mlp"),
                Site("attn2", "x_block.attn2.proj", "img"),
            ),
            replay=_replay,
        ),
    ),
    embed="x_embedder.proj",
    tokens=patches,
    fused={
        "joint_blocks": equal_parts("context_block.attn.qkv", "qkv")
        | equal_parts("x_block.attn.qkv", "qkv")
        | equal_parts("x_block.attn2.qkv", "qkv")
    },
)

"""HunyuanDiT: one stream of image tokens, text by cross-attention, long skip connections from the first half of the blocks to the second.

Source: comfy/ldm/hydit/models.py (ComfyUI 0.3.75). The first half and the middle block have no skip layer. There are no gates: the outputs
of self-attention, cross-attention and MLP are added as they are. Cross-attention rotates its queries by their positions in the picture.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .shared.base import Cached, ModelFamily, Stack
from .shared.fused import equal_parts
from .shared.patches import patches
from .shared.replaying import renewed
from .shared.video_blocks import CROSS, MLP, SELF, sites


def _is_hydit(model: nn.Module) -> bool:
    """Tells HunyuanDiT by its class and its blocks. Hunyuan3D 2.1 has a class of another name with other blocks."""
    if type(model).__name__ != "HunYuanDiT" or not len(getattr(model, "blocks", ())):
        return False
    return all(hasattr(model.blocks[0], name) for name in ("attn1", "attn2", "mlp", "default_modulation"))  # type: ignore[index]


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    """Takes self-attention from the cache, recomputes cross-attention and MLP for the chosen tokens, and the skip layer for all tokens."""
    x, text = arguments["x"], arguments["text_states"]
    places = arguments["freq_cis_img"]  # cosines and sines of positions, each (L, d)
    if block.skip_linear is not None:
        x = block.skip_linear(block.skip_norm(torch.cat((x, arguments["skip"]), dim=-1).to(x.dtype)))
    attended = x + cached.all_tokens(SELF)
    tokens = cached.choose("img", x.shape[1])

    def look(at: Tensor) -> Tensor:
        return block.attn2(block.norm3(attended[:, at]), text, tuple(waves[at] for waves in places))[0]

    x = attended + renewed(cached, CROSS, tokens, look)
    return (x + renewed(cached, MLP, tokens, lambda at: block.mlp(block.norm2(x[:, at]))),)


HYDIT = ModelFamily(
    name="hydit",
    matches=_is_hydit,
    stacks=(
        Stack(
            path="blocks",
            parameters=("x", "c", "text_states", "freq_cis_img", "skip"),
            streams={"x": "img"},
            sites=sites("attn1.out_proj", "attn2.out_proj", "mlp"),
            replay=_replay,
        ),
    ),
    embed="x_embedder.proj",
    tokens=patches,
    fused={"blocks": equal_parts("attn1.Wqkv", "qkv") | equal_parts("attn2.kv_proj", "kv")},
)

"""HiDream-I1 and E1: double blocks with separate image and text streams, then single blocks over image and text joined in this order.

Source: comfy/ldm/hidream/model.py (ComfyUI 0.3.75). The MLP picks its experts for each token separately, so from the same input it computes
the same output for a chosen token in a conservative evaluation as in a full one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .shared.base import Cached, ModelFamily, Stack
from .shared.replaying import gated, stream_sites


def _replay_double(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor, Tensor]:
    inner = block.block
    modulation = inner.adaLN_modulation(arguments["adaln_input"])[:, None].chunk(12, dim=-1)
    img = gated(cached, "img", arguments["image_tokens"], modulation[:6], inner.norm3_i, inner.ff_i)
    return img, gated(cached, "txt", arguments["text_tokens"], modulation[6:], inner.norm3_t, inner.ff_t)


def _replay_single(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    inner = block.block
    modulation = inner.adaLN_modulation(arguments["adaln_input"])[:, None].chunk(6, dim=-1)
    return (gated(cached, "img+txt", arguments["image_tokens"], modulation, inner.norm3_i, inner.ff_i),)


HIDREAM = ModelFamily(
    name="hidream",
    matches=lambda model: type(model).__name__ == "HiDreamImageTransformer2DModel" and len(getattr(model, "single_stream_blocks", ())) > 0,
    stacks=(
        Stack(
            path="double_stream_blocks",
            parameters=("image_tokens", "image_tokens_masks", "text_tokens", "adaln_input", "rope"),
            streams={"image_tokens": "img", "text_tokens": "txt"},
            sites=(
                *stream_sites("img", "block.attn1.to_out", "block.ff_i"),
                *stream_sites("txt", "block.attn1.to_out_t", "block.ff_t"),
            ),
            replay=_replay_double,
        ),
        Stack(
            path="single_stream_blocks",
            parameters=("image_tokens", "image_tokens_masks", "text_tokens", "adaln_input", "rope"),
            streams={"image_tokens": "img+txt"},
            sites=stream_sites("img+txt", "block.attn1.to_out", "block.ff_i"),
            replay=_replay_single,
        ),
    ),
    embed="x_embedder",
)

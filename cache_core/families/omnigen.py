"""OmniGen2: text, reference pictures and image in one stream, concatenated in this order.

Source: comfy/ldm/omnigen/omnigen2.py (ComfyUI 0.3.75).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .shared.base import Cached, ModelFamily, Stack
from .shared.replaying import sandwiched, stream_sites

_JOINT = "txt+ref+img"


def _is_omnigen(model: nn.Module) -> bool:
    is_named = type(model).__name__ == "OmniGen2Transformer2DModel"
    return is_named and all(len(getattr(model, name, ())) for name in ("layers", "context_refiner"))


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    modulation = block.norm1.linear(block.norm1.silu(arguments["temb"]))[:, None].chunk(4, dim=-1)
    return (sandwiched(cached, _JOINT, arguments["hidden_states"], modulation, block, block.norm2),)


OMNIGEN = ModelFamily(
    name="omnigen",
    matches=_is_omnigen,
    stacks=(
        Stack(
            path="layers",
            parameters=("hidden_states", "attention_mask", "image_rotary_emb", "temb"),
            streams={"hidden_states": _JOINT},
            sites=stream_sites(_JOINT, "attn", "feed_forward"),
            replay=_replay,
        ),
    ),
    embed="x_embedder",
)

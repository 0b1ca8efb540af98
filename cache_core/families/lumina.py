"""Lumina-Image 2.0 and Z-Image (NextDiT): text and image in one stream, text first.

Source: comfy/ldm/lumina/model.py (ComfyUI 0.3.75). Z-Image pads text and image each to a multiple of 32 tokens with padding tokens of its
own. Hosts after 0.3.75 accept reference pictures. Their tokens are replayed with those of the image where both are modulated alike. A call
whose references have a modulation of their own (timestep_zero_index) is computed in full.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from .shared.base import Cached, ModelFamily, Stack
from .shared.fused import LinearPart
from .shared.replaying import sandwiched, stream_sites

_JOINT = "txt+img+padding"


def _is_lumina(model: nn.Module) -> bool:
    refiners = (getattr(model, name, ()) for name in ("layers", "context_refiner", "noise_refiner"))
    return type(model).__name__ == "NextDiT" and all(len(blocks) for blocks in refiners)


def _qkv(block: Any) -> tuple[LinearPart, ...]:
    """Returns q, k and v of the fused layer: Lumina 2 has fewer heads for keys and values than for queries."""
    attention = block.attention
    q, kv = attention.n_local_heads * attention.head_dim, attention.n_local_kv_heads * attention.head_dim
    return LinearPart("q", slice(0, q)), LinearPart("k", slice(q, q + kv)), LinearPart("v", slice(q + kv, q + 2 * kv))


def _replay(block: Any, arguments: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    modulation = block.adaLN_modulation(arguments["adaln_input"])[:, None].chunk(4, dim=-1)
    return (sandwiched(cached, _JOINT, arguments["x"], modulation, block, block.attention_norm2),)


def _why_not(arguments: Mapping[str, Any]) -> str:
    """Refuses calls whose reference pictures are modulated separately: the replay does not make their rows of modulation."""
    return "" if arguments.get("timestep_zero_index") is None else "reference pictures have a modulation of their own (timestep_zero_index)"


LUMINA = ModelFamily(
    name="lumina",
    matches=_is_lumina,
    stacks=(
        Stack(
            path="layers",
            parameters=("x", "x_mask", "freqs_cis", "adaln_input"),
            streams={"x": _JOINT},
            why_not=_why_not,
            sites=stream_sites(_JOINT, "attention", "feed_forward"),
            replay=_replay,
        ),
    ),
    embed="x_embedder",
    fused={"layers": {"attention.qkv": _qkv}},
)

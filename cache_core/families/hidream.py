"""HiDream-I1 and E1: double blocks with separate image and text streams, then single blocks over image, text.

Source: comfy/ldm/hidream/model.py (ComfyUI 0.3.75). Traps: the host appends other Llama states to the text before every block and cuts
them off behind it, so every block sees the same number of text tokens and the stream lengths hold for all; the reference picture of E1 lies
beside the image, inside the image stream. Routed experts get only the tokens chosen for them, flattened, other ones each step: there is
nothing to add an increment to. Calibrated evaluations leave them, two thirds of an image token's weights, and their gate to the host and
answer for all other layers of tokens. Experts are picked for each token on its own, so a conservative evaluation computes of some tokens
what a full one would.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import Tensor

from ..kinds import Kind
from .base import Cached, Lengths, ModelFamily, Stack, linear_weights
from .counting import around_macs, blocks_macs
from .linears import StackLinears
from .replaying import gated, stream_sites

_SKIP = ("block.adaLN_modulation.", "block.ff_i.experts.")
_LAYERS = (
    StackLinears(
        path="double_stream_blocks",
        streams={
            **{f"block.attn1.to_{name}_t": "txt" for name in ("q", "k", "v", "out")},
            "block.attn1.": "img",
            "block.ff_i.": "img",
            "block.ff_t.": "txt",
        },
        skip=_SKIP,
    ),
    StackLinears(path="single_stream_blocks", streams={"": "img+txt"}, skip=_SKIP),
)
_PRODUCTS = (("double_stream_blocks", "img+txt", "img+txt"), ("single_stream_blocks", "img+txt", "img+txt"))
_COMMON_MACS = blocks_macs(
    _LAYERS, _PRODUCTS, attrgetter("inner_dim"), chosen=("block.ff_i.", "block.ff_t."), always=("block.adaLN_modulation.",)
)


def _expert_macs(block: Any, tokens: int) -> float:
    """What the experts cost more than the once that every layer was counted."""
    routed = block.block.ff_i
    if not hasattr(routed, "experts"):
        return 0.0
    return tokens * routed.num_activated_experts * linear_weights(routed.experts[0]) - linear_weights(routed.experts)


def _macs(model: Any, lengths: Lengths, kind: Kind, share: float) -> float:
    if kind is Kind.AGGRESSIVE:
        return 0.0
    img, txt = lengths["img"], lengths["txt"]
    experts = sum(_expert_macs(block, img) for block in model.double_stream_blocks)
    experts += sum(_expert_macs(block, img + txt) for block in model.single_stream_blocks)
    return _COMMON_MACS(model, lengths, kind, share) + experts * (1.0 if kind is Kind.FULL else share)


_AROUND = around_macs(
    {"x_embedder": "img", "t_embedder": "", "p_embedder": "", "final_layer.linear": "img", "final_layer.adaLN_modulation": ""}
)


def _outside_macs(model: Any, lengths: Lengths) -> float:
    """A third of the text tokens goes through each block's own projection: T5's, the last Llama states', the block's."""
    return _AROUND(model, lengths) + lengths["txt"] // 3 * linear_weights(model.caption_projection)


def _replay_double(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor, Tensor]:
    inner = block.block
    modulation = inner.adaLN_modulation(call["adaln_input"])[:, None].chunk(12, dim=-1)
    img = gated(cached, "img", call["image_tokens"], modulation[:6], inner.norm3_i, inner.ff_i)
    return img, gated(cached, "txt", call["text_tokens"], modulation[6:], inner.norm3_t, inner.ff_t)


def _replay_single(block: Any, call: Mapping[str, Any], cached: Cached) -> tuple[Tensor]:
    inner = block.block
    modulation = inner.adaLN_modulation(call["adaln_input"])[:, None].chunk(6, dim=-1)
    return (gated(cached, "img+txt", call["image_tokens"], modulation, inner.norm3_i, inner.ff_i),)


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
    hidden="img",
    channels=attrgetter("inner_dim"),
    embed="x_embedder",
    input_channels=attrgetter("x_embedder.proj.in_features"),
    macs=_macs,
    outside_macs=_outside_macs,
    linears=_LAYERS,
)

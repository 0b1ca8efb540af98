"""Kandinsky 5: blocks of self-attention, cross-attention to text and feed-forward over one stream of picture or video tokens.

Source: comfy/ldm/kandinsky5/model.py of ComfyUI 0.33.0, where it is tested; 0.3.75 has no such class.
Blocks return a new tensor; all modulation is inside them, one vector a call. Text goes through two blocks of its own, which feed nothing
but the cross-attention: a skipped evaluation leaves them out. The first layer gets the patches already, in a grid.
Above 8192 tokens, which every video has, the host calls some layers of self-attention and feed-forward several times each, every time with
a part of the tokens. The text blocks run before tokens are counted: calibrated evaluations leave them to the host. A version with sparse
attention (`sparse_params`), which orders tokens in another way between the first layer and the blocks, is not this family. Trap: the host's
own `original_block` for block patches names parameters that blocks do not have, so it fails with and without a cache.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from .as_read import blocks_take, has
from .base import ModelFamily, Stack
from .counting import around_macs, blocks_macs
from .linears import StackLinears

_VISUAL, _TEXT = "visual_transformer_blocks", "text_transformer_blocks"
_IN_PIECES = ("self_attention.to_query", "self_attention.to_key", "feed_forward.")
_LAYERS = (
    StackLinears(
        _VISUAL, {"cross_attention.to_key": "txt", "cross_attention.to_value": "txt", "": "img"}, ("visual_modulation.",), pieces=_IN_PIECES
    ),
    StackLinears(_TEXT, {"": "txt"}, skip=("text_modulation.",)),
)
_ATTENTION = ((_VISUAL, "img", "img"), (_VISUAL, "img", "txt"), (_TEXT, "txt", "txt"))


def _is_kandinsky5(model: nn.Module) -> bool:
    return (
        type(model).__name__ == "Kandinsky5"
        and blocks_take(model, _VISUAL, "visual_embed", "text_embed", "time_embed", "freqs", "transformer_options")
        and blocks_take(model, _TEXT, "x", "time_embed", "freqs", "transformer_options")
        and has(model, "model_dim", "visual_embeddings.in_layer.in_features", "out_layer.modulation", "out_layer.out_layer")
    )


def _unrefined(x: Tensor, *_args: Any, **_call: Any) -> Tensor:
    return x


KANDINSKY5 = ModelFamily(
    name="kandinsky5",
    matches=_is_kandinsky5,
    stacks=(
        Stack(
            path=_VISUAL,
            parameters=("visual_embed", "text_embed", "time_embed", "freqs", "transformer_options"),
            streams={"visual_embed": "img"},
            contexts={"text_embed": "txt"},
        ),
    ),
    hidden="img",
    channels=attrgetter("model_dim"),
    embed="visual_embeddings.in_layer",
    input_channels=attrgetter("visual_embeddings.in_layer.in_features"),
    tokens=lambda _layer, given: given.flatten(1, -2),
    macs=blocks_macs(_LAYERS, _ATTENTION, attrgetter("model_dim")),
    outside_macs=around_macs(
        {
            "visual_embeddings": "img",
            "text_embeddings": "txt",
            "pooled_text_embeddings": "",
            "time_embeddings": "",
            "out_layer.modulation": "",
            "out_layer.out_layer": "img",
        }
    ),
    linears=_LAYERS[:1],
    idle=lambda model: tuple((block, _unrefined) for block in model.text_transformer_blocks),  # type: ignore[union-attr]
)

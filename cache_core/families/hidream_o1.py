"""HiDream-O1: a language model's decoder over text tokens, one token of the noise level, pixel patches, patches of reference pictures.

Source: comfy/ldm/hidream_o1/model.py and attention.py, comfy/text_encoders/llama.py (TransformerBlock) of ComfyUI 0.33.0, where it is
tested; 0.3.75 has no such class.

Blocks write into their input and return the tokens and their keys and values. Traps: the host keeps the text's keys and values over
evaluations, so a block sees all tokens ("cold") or all but the text ("hot"), and another number of them ("past") lies in its cache; an
evaluation in which the host fills that cache needs every block, so it is never skipped; with reference pictures, which the host makes anew
every time, that is every one. Reference patches follow the image's and are kept with it: what tells them apart is not seen from the blocks.
No calibrated evaluations: from cold to hot the tokens change in number.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from ..kinds import Kind
from .as_read import blocks_take, has, layers_are
from .base import Lengths, ModelFamily, Stack, linear_weights
from .counting import around_macs

_PATH = "language_model.layers"
_PARAMETERS = ("x", "attention_mask", "freqs_cis", "optimized_attention", "past_key_value")
_AROUND = (
    "visual", "language_model.embed_tokens", "language_model.norm", "t_embedder1", "x_embedder.proj1.in_features", "x_embedder.proj2",
    "final_layer2.linear", "hidden_size", "patch_size", "tms_token_id",
)  # fmt: skip
_LAYERS = (*(f"self_attn.{name}_proj" for name in "qkvo"), *(f"mlp.{name}_proj" for name in ("gate", "up", "down")))


def _is_hidream_o1(model: Any) -> bool:
    if type(model).__name__ != "HiDreamO1Transformer" or not has(model, *_AROUND):
        return False
    return blocks_take(model, _PATH, *_PARAMETERS) and layers_are(model, _PATH, *_LAYERS)


def _past(call: Mapping[str, Any]) -> int:
    past = call.get("past_key_value")
    return int(past[2]) if past else 0


def _why_not(call: Mapping[str, Any]) -> str:
    """An empty tuple asks for keys and values, a filled one holds them; None is neither."""
    past = call.get("past_key_value")
    return "the host fills its cache of the text in this evaluation" if past is not None and not len(past) else ""


def _macs(model: Any, lengths: Lengths, kind: Kind, _share: float) -> float:
    """Keys and values are repeated for all heads, so a product is as wide as the queries. Text before the last token sees only text."""
    if kind is Kind.AGGRESSIVE:
        return 0.0
    txt, vis, past = lengths["txt"], lengths["vis"], lengths["past"]
    own, everything = txt - 1, txt + vis + past
    pairs = own * own + (1 + vis) * everything
    layers = attrgetter(_PATH)(model)
    return float(sum((txt + vis) * linear_weights(layer) + 2 * pairs * layer.self_attn.q_proj.out_features for layer in layers))


HIDREAM_O1 = ModelFamily(
    name="hidream_o1",
    matches=_is_hidream_o1,
    stacks=(
        Stack(
            path=_PATH,
            parameters=_PARAMETERS,
            streams={"x": "txt+vis"},
            counts=lambda call, _lengths: {"past": _past(call)},
            beside=1,
            why_not=_why_not,
        ),
    ),
    measures={"x_embedder": "vis"},
    hidden="vis",
    channels=attrgetter("hidden_size"),
    embed="x_embedder",
    input_channels=attrgetter("x_embedder.proj1.in_features"),
    macs=_macs,
    outside_macs=around_macs({"x_embedder": "vis", "t_embedder1": "", "final_layer2": "vis"}),
)

"""Anima: Cosmos-Predict2's network, with an adapter that turns a language model's text embeddings into ones in the place of T5's.

Source: comfy/ldm/anima/model.py and comfy/ldm/cosmos/predict2.py of ComfyUI 0.33.0, with which it is tested; ComfyUI 0.3.75 has no such
class. For a model in float16 the host holds the stream between blocks in float32, so the hidden state is kept in float32 too.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .cosmos_predict2 import COSMOS_PREDICT2
from .shared.as_read import takes


def _is_anima(model: Any) -> bool:
    parameters = COSMOS_PREDICT2.stacks[0].parameters
    return type(model).__name__ == "Anima" and hasattr(model, "blocks") and all(takes(block, *parameters) for block in model.blocks)


ANIMA = replace(COSMOS_PREDICT2, name="anima", matches=_is_anima)

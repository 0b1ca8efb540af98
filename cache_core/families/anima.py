"""Anima: Cosmos-Predict2's network, told by a language model's text that an adapter has made into T5's.

Source: comfy/ldm/anima/model.py and comfy/ldm/cosmos/predict2.py of ComfyUI 0.33.0, where it is tested; 0.3.75 has no such class. At 16 bit
(float16) the host keeps the stream between blocks in float32, and so is what is kept of it.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from .as_read import takes
from .cosmos_predict2 import COSMOS_PREDICT2


def _is_anima(model: Any) -> bool:
    parameters = COSMOS_PREDICT2.stacks[0].parameters
    return type(model).__name__ == "Anima" and hasattr(model, "blocks") and all(takes(block, *parameters) for block in model.blocks)


ANIMA = replace(COSMOS_PREDICT2, name="anima", matches=_is_anima)

"""Anima: Cosmos-Predict2's network, told by a language model's text that an adapter has made into T5's.

Source: comfy/ldm/anima/model.py and comfy/ldm/cosmos/predict2.py of ComfyUI 0.33.0, where it is tested; 0.3.75 has no such class. At 16 bit
(float16) the host keeps the stream between blocks in float32, and so is what is kept of it.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from .as_read import blocks_take
from .cosmos_predict2 import COSMOS_PREDICT2


def _is_anima(model: nn.Module) -> bool:
    return type(model).__name__ == "Anima" and blocks_take(model, "blocks", *COSMOS_PREDICT2.stacks[0].parameters)


ANIMA = replace(COSMOS_PREDICT2, name="anima", matches=_is_anima)

"""Models of which nothing is known but the name that their sidecars go by, by the name of the network's class."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "ACEStepTransformer2DModel": "ace_step",
        "AceStepConditionGenerationModel": "ace_step15",
        "CogVideoXTransformer3DModel": "cogvideox",
        "HeliosModel": "helios",
        "Kandinsky5": "kandinsky5",
        "LTXAVModel": "ltxav",
        "MiniMaxH3Model": "minimax_h3",
    }
)

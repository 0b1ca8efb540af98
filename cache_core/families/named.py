"""Names, for reports and sidecars, the models that need no other description. A model that is not listed goes by the name of its class."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

NAMES: Mapping[str, str] = MappingProxyType(
    {
        "ACEStepTransformer2DModel": "ace_step",
        "AceStepConditionGenerationModel": "ace_step15",
        "CogVideoXTransformer3DModel": "cogvideox",
        "ErnieImageModel": "ernie",
        "HeliosModel": "helios",
        "HiDreamO1Transformer": "hidream_o1",
        "HunYuanDiTPlain": "hunyuan3d_2_1",
        "Kandinsky5": "kandinsky5",
        "LTXAVModel": "ltxav",
        "MiniMaxH3Model": "minimax_h3",
    }
)

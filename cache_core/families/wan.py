"""Wan 2.1 and 2.2: blocks of self-attention, cross-attention to text and feed-forward over one stream of video tokens.

Source: comfy/ldm/wan/model.py, model_animate.py (ComfyUI 0.3.75). All models have the same blocks (wan_blocks.py) and are told apart for
their sidecars alone. What VACE, Animate and S2V add between blocks, from modules beside them, runs in a conservative evaluation as in a
full one. Reference latents add tokens before (`ref_conv`) or behind the video, which a calibrated forecast does not know.
Wan 2.2's two experts are two models in two samplers: two runs, the second starting in the middle of the schedule.
"""

from __future__ import annotations

from typing import Any

from .base import ModelFamily, Stack
from .patches import patches
from .wan_blocks import SITES, replay


def _family(name: str, class_names: tuple[str, ...], sees_clip: bool | None = None, more: tuple[str, ...] = ()) -> ModelFamily:
    """sees_clip: whether the blocks look at a CLIP picture beside the text, None for either. more: what its blocks are given beside."""

    def matches(model: Any) -> bool:
        return type(model).__name__ in class_names and (sees_clip is None or hasattr(model.blocks[0].cross_attn, "k_img") == sees_clip)

    stack = Stack(
        path="blocks",
        parameters=("x", "e", "freqs", "context", "context_img_len", *more, "transformer_options"),
        streams={"x": "img"},
        sites=SITES,
        replay=replay,
    )
    return ModelFamily(name, matches, (stack,), embed="patch_embedding", tokens=patches)


_PLAIN = ("WanModel", "CameraWanModel")

WAN = _family("wan", _PLAIN, sees_clip=False)
WAN_I2V = _family("wan_i2v", _PLAIN, sees_clip=True)
WAN_HUMO = _family("wan_humo", ("HumoWanModel",), more=("audio",))
WAN_VACE = _family("wan_vace", ("VaceWanModel",))
WAN_ANIMATE = _family("wan_animate", ("AnimateWanModel",))
WAN_S2V = _family("wan_s2v", ("WanModel_S2V",))

"""Wan 2.1 and 2.2: blocks of self-attention, cross-attention to text and MLP over one stream of video tokens.

Source: comfy/ldm/wan/model.py, model_animate.py (ComfyUI 0.3.75). All models have the same blocks (wan_blocks.py) and are families of
their own only for the sake of their sidecars. VACE, Animate and S2V add something to the stream between blocks, from modules outside the
blocks; those run in a conservative evaluation as in a full one. Reference latents add tokens before the video (`ref_conv`) or after it,
for which calibrated forecasts have no input. Wan 2.2's two experts are two models in two samplers: two runs, the second of which starts
at a noise level in the middle.
"""

from __future__ import annotations

from typing import Any

from .shared.base import ModelFamily, Stack
from .shared.patches import patches
from .shared.wan_blocks import SITES, replay


def _family(name: str, class_names: tuple[str, ...], sees_clip: bool | None = None, more: tuple[str, ...] = ()) -> ModelFamily:
    """Returns a family of Wan models.

    Args:
        name: As in `ModelFamily`.
        class_names: Names of the classes of its networks.
        sees_clip: Whether cross-attention takes the CLIP embedding of a picture as well as text; None matches networks of both forms.
        more: Further parameters of the blocks, in order, before `transformer_options`.
    """

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

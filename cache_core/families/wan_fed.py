"""Wan models with modules beside the blocks whose results the host adds between them: VACE, Animate and S2V.

Source: comfy/ldm/wan/model.py, model_animate.py (ComfyUI 0.3.75). What is added between blocks is in the last hidden state and so in its
forecast; a skipped evaluation leaves those modules out, a conservative one runs them as a full one does. What the host adds behind the
last block still runs in a skip: S2V's last audio injection. VACE blocks run once per control video; calibrated evaluations know one, more
are computed in full. Not counted: Animate's face adapter (under 2 % of the multiply-adds of a full evaluation) and S2V's audio injections
(under 5 %).
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .wan import SEES_CLIP, sees_clip, wan_family
from .wan_blocks import wan_linears


def _is_vace(model: Any) -> bool:
    """Control must not come in behind the last block: a forecast of its output would lack it. No known checkpoint is made so."""
    return type(model).__name__ == "VaceWanModel" and len(model.blocks) - 1 not in model.vace_layers_mapping


def _no_control(c: Tensor, x: Tensor, **_call: Any) -> tuple[Tensor, Tensor]:
    return c.new_zeros(()), c


def _no_face(x: Tensor, *_args: Any, **_call: Any) -> Tensor:
    return x.new_zeros(())


def _no_audio(x: Tensor, **_call: Any) -> Tensor:
    return x


def _injectors(model: Any) -> tuple[tuple[nn.Module, Any], ...]:
    """All but the one behind the last block, whose result the forecast does not hold."""
    places = model.audio_injector.injected_block_id.items()
    return tuple((model.audio_injector.injector[i], _no_audio) for block, i in places if block != len(model.blocks) - 1)


WAN_VACE = wan_family(
    "wan_vace",
    _is_vace,
    linears=(wan_linears("vace_blocks"),),
    attention=(("vace_blocks", "img", "img"), ("vace_blocks", "img", "txt")),
    places={"vace_patch_embedding": "img"},
    idle=lambda model: tuple((block, _no_control) for block in model.vace_blocks),  # type: ignore[union-attr]
)
WAN_ANIMATE = wan_family(
    "wan_animate",
    lambda model: type(model).__name__ == "AnimateWanModel" and sees_clip(model),
    **SEES_CLIP,
    idle=lambda model: tuple((block, _no_face) for block in model.face_adapter.fuser_blocks),  # type: ignore[union-attr]
)
WAN_S2V = wan_family("wan_s2v", lambda model: type(model).__name__ == "WanModel_S2V", idle=_injectors)

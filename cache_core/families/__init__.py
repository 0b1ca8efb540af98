"""WHERE features live in a model: one file a family, one line in the table."""

from __future__ import annotations

from torch import nn

from .ace_step import ACE_STEP
from .ace_step15 import ACE_STEP15
from .anima import ANIMA
from .aura import AURA
from .base import Lengths, ModelFamily, Site, Stack, UnknownInputError, UnsupportedCallError
from .chroma import CHROMA
from .chroma_radiance import CHROMA_RADIANCE
from .cogvideox import COGVIDEOX, COGVIDEOX_1_5
from .cosmos import COSMOS
from .cosmos_predict2 import COSMOS_PREDICT2
from .dit import DIT
from .ernie import ERNIE
from .flux import FLUX
from .flux2 import FLUX2
from .helios import HELIOS
from .hidream import HIDREAM
from .hidream_o1 import HIDREAM_O1
from .hunyuan3d import HUNYUAN3D
from .hunyuan3d_2_1 import HUNYUAN3D_2_1
from .hunyuan_video import HUNYUAN_VIDEO, HUNYUAN_VIDEO_IMAGE_FIRST
from .hydit import HYDIT
from .kandinsky5 import KANDINSKY5
from .ltxav import LTXAV
from .ltxv import LTXV
from .lumina import LUMINA
from .minimax_h3 import MINIMAX_H3
from .mochi import MOCHI
from .omnigen import OMNIGEN
from .opensora import OPENSORA
from .opensora2 import OPENSORA2
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .stable_audio import STABLE_AUDIO
from .wan import WAN, WAN_HUMO, WAN_I2V
from .wan_fed import WAN_ANIMATE, WAN_S2V, WAN_VACE

FAMILIES: tuple[ModelFamily, ...] = (
    FLUX,
    FLUX2,
    CHROMA,
    CHROMA_RADIANCE,
    HUNYUAN_VIDEO,
    HUNYUAN_VIDEO_IMAGE_FIRST,
    HUNYUAN3D,
    HUNYUAN3D_2_1,
    QWEN_IMAGE,
    DIT,
    PIXART,
    LUMINA,
    SD3,
    HIDREAM,
    HIDREAM_O1,
    AURA,
    OMNIGEN,
    HYDIT,
    WAN,
    WAN_I2V,
    WAN_VACE,
    WAN_ANIMATE,
    WAN_S2V,
    WAN_HUMO,
    LTXV,
    COSMOS,
    COSMOS_PREDICT2,
    MOCHI,
    OPENSORA,
    OPENSORA2,
    ACE_STEP,
    STABLE_AUDIO,
    ERNIE,
    MINIMAX_H3,
    HELIOS,
    KANDINSKY5,
    ANIMA,
    COGVIDEOX,
    COGVIDEOX_1_5,
    ACE_STEP15,
    LTXAV,
)


def find_family(model: nn.Module) -> ModelFamily | None:
    """The family of a diffusion model, or None for one this pack does not know. Looks through torch.compile."""
    model = getattr(model, "_orig_mod", model)
    return next((family for family in FAMILIES if family.matches(model)), None)


__all__ = ["FAMILIES", "Lengths", "ModelFamily", "Site", "Stack", "UnknownInputError", "UnsupportedCallError", "find_family"]

"""Describes what watching a network cannot show: one file per family, one entry in `FAMILIES`."""

from __future__ import annotations

from torch import nn

from ..blocks import unwrapped
from .anima import ANIMA
from .aura import AURA
from .cosmos import COSMOS
from .cosmos_predict2 import COSMOS_PREDICT2
from .dit import DIT
from .flux import CHROMA, CHROMA_RADIANCE, FLUX, FLUX2, HUNYUAN3D, HUNYUAN_VIDEO
from .hidream import HIDREAM
from .hydit import HYDIT
from .ltxv import LTXV
from .lumina import LUMINA
from .mochi import MOCHI
from .named import NAMES
from .omnigen import OMNIGEN
from .opensora import OPENSORA
from .opensora2 import OPENSORA2
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3
from .shared.base import ModelFamily, Site, Stack
from .stable_audio import STABLE_AUDIO
from .wan import WAN, WAN_ANIMATE, WAN_HUMO, WAN_I2V, WAN_S2V, WAN_VACE

FAMILIES: tuple[ModelFamily, ...] = (
    ANIMA,
    AURA,
    CHROMA,
    CHROMA_RADIANCE,
    COSMOS,
    COSMOS_PREDICT2,
    DIT,
    FLUX,
    FLUX2,
    HIDREAM,
    HUNYUAN3D,
    HUNYUAN_VIDEO,
    HYDIT,
    LTXV,
    LUMINA,
    MOCHI,
    OMNIGEN,
    OPENSORA,
    OPENSORA2,
    PIXART,
    QWEN_IMAGE,
    SD3,
    STABLE_AUDIO,
    WAN,
    WAN_ANIMATE,
    WAN_HUMO,
    WAN_I2V,
    WAN_S2V,
    WAN_VACE,
)


def find_family(model: nn.Module) -> ModelFamily:
    """Returns the family that describes a network, or one that only names it where no file describes it.

    A network compiled by torch.compile is recognised by the module that it wraps.
    """
    model = unwrapped(model)
    return next((family for family in FAMILIES if family.matches(model)), undescribed(model))


def undescribed(model: nn.Module) -> ModelFamily:
    """Returns a family that matches every network of this class and states nothing but a name."""
    own = type(model)
    return ModelFamily(NAMES.get(own.__name__, own.__name__.lower()), lambda other: type(other) is own)


__all__ = ["FAMILIES", "ModelFamily", "Site", "Stack", "find_family", "undescribed"]

"""What is known of models beside what is found out by watching them: one file a family, one line in the table."""

from __future__ import annotations

from torch import nn

from .anima import ANIMA
from .base import ModelFamily, Site, Stack
from .cosmos import COSMOS
from .cosmos_predict2 import COSMOS_PREDICT2
from .flux import FLUX
from .ltxv import LTXV
from .mochi import MOCHI
from .named import NAMES
from .opensora import OPENSORA
from .opensora2 import OPENSORA2
from .stable_audio import STABLE_AUDIO
from .wan import WAN, WAN_ANIMATE, WAN_HUMO, WAN_I2V, WAN_S2V, WAN_VACE

FAMILIES: tuple[ModelFamily, ...] = (
    FLUX,
    WAN,
    WAN_I2V,
    WAN_HUMO,
    WAN_VACE,
    WAN_ANIMATE,
    WAN_S2V,
    LTXV,
    COSMOS,
    COSMOS_PREDICT2,
    ANIMA,
    MOCHI,
    OPENSORA,
    OPENSORA2,
    STABLE_AUDIO,
)


def find_family(model: nn.Module) -> ModelFamily:
    """The family of a diffusion model; of one that no file describes, one that is no more than a name. Looks through torch.compile."""
    model = getattr(model, "_orig_mod", model)
    return next((family for family in FAMILIES if family.matches(model)), undescribed(model))


def undescribed(model: nn.Module) -> ModelFamily:
    """Of all models of this class, known by its name."""
    own = type(model)
    return ModelFamily(NAMES.get(own.__name__, own.__name__.lower()), lambda other: type(other) is own)


__all__ = ["FAMILIES", "ModelFamily", "Site", "Stack", "find_family", "undescribed"]

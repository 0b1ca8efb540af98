"""What is known of models beside what is found out by watching them: one file a family, one line in the table."""

from __future__ import annotations

from torch import nn

from .aura import AURA
from .base import ModelFamily, Site, Stack
from .dit import DIT
from .flux import CHROMA, CHROMA_RADIANCE, FLUX, FLUX2, HUNYUAN3D, HUNYUAN_VIDEO
from .hidream import HIDREAM
from .hydit import HYDIT
from .lumina import LUMINA
from .named import NAMED
from .omnigen import OMNIGEN
from .pixart import PIXART
from .qwen_image import QWEN_IMAGE
from .sd3 import SD3

FAMILIES: tuple[ModelFamily, ...] = (
    AURA,
    CHROMA,
    CHROMA_RADIANCE,
    DIT,
    FLUX,
    FLUX2,
    HIDREAM,
    HUNYUAN3D,
    HUNYUAN_VIDEO,
    HYDIT,
    LUMINA,
    OMNIGEN,
    PIXART,
    QWEN_IMAGE,
    SD3,
)


def find_family(model: nn.Module) -> ModelFamily:
    """The family of a diffusion model; of one that no file describes, one that is no more than a name. Looks through torch.compile."""
    model = getattr(model, "_orig_mod", model)
    return next((family for family in FAMILIES if family.matches(model)), undescribed(model))


def undescribed(model: nn.Module) -> ModelFamily:
    """Of all models of this class, known by its name."""
    own = type(model)
    return ModelFamily(NAMED.get(own.__name__, own.__name__.lower()), lambda other: type(other) is own)


__all__ = ["FAMILIES", "ModelFamily", "Site", "Stack", "find_family", "undescribed"]

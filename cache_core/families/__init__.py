"""WHERE features live in a model: one file a family, one line in the table."""

from __future__ import annotations

from torch import nn

from .base import Lengths, ModelFamily, Site, Stack, UnsupportedCallError
from .flux import FLUX
from .qwen_image import QWEN_IMAGE

FAMILIES: tuple[ModelFamily, ...] = (
    FLUX,
    QWEN_IMAGE,
)


def find_family(model: nn.Module) -> ModelFamily | None:
    """The family of a diffusion model, or None for one this pack does not know. Looks through torch.compile."""
    model = getattr(model, "_orig_mod", model)
    return next((family for family in FAMILIES if family.matches(model)), None)


__all__ = ["FAMILIES", "Lengths", "ModelFamily", "Site", "Stack", "UnsupportedCallError", "find_family"]

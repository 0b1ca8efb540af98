"""What is known of models beside what is found out by watching them: one file a family, one line in the table."""

from __future__ import annotations

from torch import nn

from .base import ModelFamily, Site, Stack
from .flux import FLUX

FAMILIES: tuple[ModelFamily, ...] = (FLUX,)


def find_family(model: nn.Module) -> ModelFamily:
    """The family of a diffusion model; one that says no more than a name for a model that no file describes. Looks through torch.compile."""
    model = getattr(model, "_orig_mod", model)
    return next((family for family in FAMILIES if family.matches(model)), undescribed(model))


def undescribed(model: nn.Module) -> ModelFamily:
    """Of all models of this class, known by its name."""
    own = type(model)
    return ModelFamily(own.__name__.lower(), lambda other: type(other) is own)


__all__ = ["FAMILIES", "ModelFamily", "Site", "Stack", "find_family", "undescribed"]

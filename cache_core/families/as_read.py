"""Whether a model looks exactly as it did in public source, for families of which a host may have another form.

Names alone would let a later host's other signature through, and a stream read from the wrong argument is worse than no cache.
"""

from __future__ import annotations

from inspect import signature
from operator import attrgetter

from torch import nn


def takes(module: object, *parameters: str) -> bool:
    """Whether the module's class has a `forward` of exactly these parameters, in this order. Looks through torch.compile."""
    module = getattr(module, "_orig_mod", module)
    return isinstance(module, nn.Module) and tuple(signature(type(module).forward).parameters)[1:] == parameters


def has(module: object, *paths: str) -> bool:
    """Whether there is something, not None, at all of these dotted paths."""
    try:
        return all(attrgetter(path)(module) is not None for path in paths)
    except AttributeError:
        return False


def blocks_take(model: nn.Module, path: str, *parameters: str) -> bool:
    """Whether there are blocks at `path`, and all of them take exactly these parameters."""
    if not has(model, path):
        return False
    blocks = attrgetter(path)(model)
    return isinstance(blocks, nn.ModuleList) and len(blocks) > 0 and all(takes(block, *parameters) for block in blocks)


def layers_are(model: nn.Module, path: str, *layers: str) -> bool:
    """Whether the linear layers of every block at `path` are exactly these, by their dotted paths inside the block."""
    blocks = [getattr(block, "_orig_mod", block) for block in attrgetter(path)(model)]
    found = [{name for name, m in block.named_modules() if hasattr(m, "in_features") and hasattr(m, "out_features")} for block in blocks]
    return all(names == set(layers) for names in found)

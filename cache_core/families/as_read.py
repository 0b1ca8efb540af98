"""Whether a module looks as it did in public source, where a host may have another form.

Names alone would let a later host's other signature through, and a stream that a replay reads from the wrong argument is worse than none.
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

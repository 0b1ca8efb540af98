"""Checks whether a module has the form that it has in the public source that a family was written from.

A class name is not enough: a later host may change a signature under the same name. A replay would then read a stream from the wrong
argument and return a wrong result, which is worse than having no replay.
"""

from __future__ import annotations

from inspect import signature
from operator import attrgetter

from torch import nn

from ...blocks import unwrapped


def takes(module: object, *parameters: str) -> bool:
    """Returns whether the module's `forward` has exactly these parameters, in this order.

    A compiled module (torch.compile) is judged by the module that it wraps.
    """
    module = unwrapped(module)
    return isinstance(module, nn.Module) and tuple(signature(type(module).forward).parameters)[1:] == parameters


def has(module: object, *paths: str) -> bool:
    """Returns whether every one of these dotted paths leads to something other than None."""
    try:
        return all(attrgetter(path)(module) is not None for path in paths)
    except AttributeError:
        return False

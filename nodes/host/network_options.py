"""Picks the transformer options of a call that change what the network computes, in a form that can be compared.

Guidance evaluates the same conds again in a network that differs by its options only (layers left out, attention replaced, flags of a
model). Options that are known to change nothing are ignored. All others count, so an unknown option makes a separate pass.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Hashable, Mapping
from types import FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch.utils.weak import WeakIdKeyDictionary

from .keys import KEY

_DEEPEST = 4  # levels of nested containers and closures that are compared; deeper objects count by identity
_SHORT = 1024  # bytes up to which a tensor or array on the CPU counts by its values, as it may be made anew at every call
_HARMLESS = frozenset({
    "cond_or_uncond", "uuids", "sigmas", "sample_sigmas",  # conds and noise level, which the cache takes from other places
    "callbacks",  # called around the sampling
    "prefetch_dynamic_vbars", "multigpu_thread_device",  # where and when, not what
    "block_index", "block_type", "total_blocks", "block", "transformer_index",  # the host counts its blocks here
    "img_slice", "original_shape", "activations_shape", "latent_shapes", "grid_sizes", "n_heads", "dim_head",
})  # fmt: skip
_numbers = WeakIdKeyDictionary()  # one for each object; unlike an address, a number is never given to a second object
_functions = WeakIdKeyDictionary()  # comparable form of each function, made when it was first seen
_count = itertools.count()


def variant_of(options: Mapping[str, Any]) -> frozenset[tuple[str, Hashable]]:
    """Returns name and value of every option that may change what the network computes. Empty values and None count as absent."""
    found = []
    for name, value in options.items():
        if name in _HARMLESS or name.startswith(KEY):
            continue
        comparable = _wrappers(value) if name == "wrappers" else _comparable(value, _DEEPEST)
        if comparable is not None and comparable != ():  # not False: an option may be on unless it is said to be off
            found.append((name, comparable))
    return frozenset(found)


def _wrappers(value: Mapping[str, Mapping[Any, Any]]) -> Hashable:
    """Compares other nodes' wrappers by identity: they are made once, and variables of theirs may count steps. Ours change nothing."""
    return _comparable({kind: {key: own for key, own in by_key.items() if key != KEY} for kind, by_key in value.items()}, 3)


def _comparable(value: Any, depth: int) -> Hashable:
    """Returns a form that is equal for values with the same effect, as far as can be seen without running them.

    Functions that are made anew at every call count as equal if their code, defaults and closed-over variables are.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, (str, bytes, bool, int, float, torch.dtype, torch.device)):
        return value
    if isinstance(value, (torch.Tensor, np.ndarray)):
        return _values(value)
    if depth == 0:
        return _identity(value)
    inner = functools.partial(_comparable, depth=depth - 1)
    if isinstance(value, Mapping):
        pairs = ((inner(key), inner(item)) for key, item in value.items())
        return tuple(sorted(((k, v) for k, v in pairs if v != ()), key=repr))
    if isinstance(value, (list, tuple, set, frozenset)):
        return tuple(inner(item) for item in value)
    if isinstance(value, functools.partial):
        return inner(value.func), inner(value.args), inner(value.keywords)
    if isinstance(value, MethodType):
        return inner(value.__func__), _identity(value.__self__)
    if isinstance(value, FunctionType):
        if value not in _functions:  # made once per function: its closed-over variables may count steps or keep the last call
            cells = tuple(inner(cell.cell_contents) for cell in value.__closure__ or () if _is_filled(cell))
            _functions[value] = _identity(value.__code__), inner(value.__defaults__ or ()), cells
        return _functions[value]
    return _identity(value)


def _values(value: torch.Tensor | np.ndarray) -> Hashable:
    is_here = isinstance(value, np.ndarray) or (value.device.type == "cpu" and value.layout is torch.strided and not value.is_nested)
    if is_here and value.nbytes <= _SHORT:
        return tuple(value.shape), str(value.dtype), repr(value.tolist())
    return _identity(value)


def _identity(value: Any) -> Hashable:
    """Identifies the object. Another one is never equal, even if it has the address that this one had."""
    try:
        return type(value).__name__, _numbers.setdefault(value, next(_count))
    except TypeError:  # the few types without weak references count by their address
        return type(value).__name__, id(value)


def _is_filled(cell: Any) -> bool:
    try:
        cell.cell_contents  # noqa: B018 - raises where the variable was never set
    except ValueError:
        return False
    return True

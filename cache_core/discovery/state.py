"""Detects what a network remembers from one call to the next: counters, caches of keys and values, on itself or in its arguments."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from .trees import tensors

Facts = dict[str, Any]
_MOST_ITEMS = 64  # of a container that are compared; its length is compared in any case
_DEEPEST = 3  # levels of containers and plain objects inside each other


class TensorFact(NamedTuple):
    """Identifies a tensor and its contents.

    Args:
        tensor: The tensor itself, as the id of one that is gone may be used again.
        written: How often it was written to. In inference mode, where torch does not count that, its sum and norm.
    """

    tensor: Tensor
    written: Any


def facts_of(network: nn.Module, bookkeeping: tuple[str, ...] = ()) -> Facts:
    """Returns the numbers and tensors that modules hold beside weights, by name, in a form that can be compared.

    Layers with a weight of their own are left out, as hosts keep records on them.

    Args:
        bookkeeping: Prefixes of attributes that are left out, see `Places`.
    """
    facts: Facts = {}
    for name, module in network.named_modules():
        if _has_weight(module):
            continue
        for key, value in (*module.__dict__.items(), *module._buffers.items()):
            if key not in _OF_TORCH and not key.startswith(bookkeeping):
                facts.update(_facts(value, f"{name}.{key}".lstrip(".")))
    return facts


def facts_given(args: tuple, kwargs: Mapping[str, Any]) -> Facts:
    """Returns the tensors that a call is given inside containers.

    Those given directly as arguments are left out, as some networks write into them, skipped or not.
    """
    return {f"given {'.'.join(map(str, path[1:]))}": fact_of(tensor) for path, tensor in tensors((args, kwargs)) if len(path) > 2}


def changed(before: Facts, after: Facts, strict: Collection[str] = ("",)) -> tuple[str, str]:
    """Returns the name of the first fact that has changed, and of the first that is new; "" for none.

    Args:
        strict: Prefixes of the names in blocks, by default all names. There, a new tensor in place of another of its shape is a
            change. Elsewhere it is not: some networks keep a log that nobody reads, and where it is read the proof fails.
    """
    starts = tuple(strict)
    other = (name for name, value in before.items() if name in after and _differ(value, after[name], name.startswith(starts)))
    return next(other, ""), next((name for name in after if name not in before), "")


def _differ(one: Any, other: Any, is_strict: bool) -> bool:
    if not (isinstance(one, TensorFact) and isinstance(other, TensorFact)):
        return bool(one != other)
    if one.tensor is other.tensor:
        return bool(one.written != other.written)
    return is_strict or one.tensor.shape != other.tensor.shape


@contextmanager
def untouched(network: nn.Module, bookkeeping: tuple[str, ...] = ()) -> Iterator[None]:
    """Restores the attributes of modules that are numbers, tensors or None, after calls that only try something.

    What was written into a tensor or a container is not undone. Layers with a weight of their own are left as they are.

    Args:
        bookkeeping: Prefixes of attributes that are left as they are, see `Places`.
    """
    before = [(own, dict(own)) for own in _attributes(network)]
    try:
        yield
    finally:
        for own, values in before:
            for key in [key for key, value in own.items() if _is_plain(value) and value is not values.get(key, _MISSING)]:
                if key.startswith(bookkeeping):
                    continue
                if key in values:
                    own[key] = values[key]
                elif key not in _OF_TORCH:
                    del own[key]


def _attributes(network: nn.Module) -> Iterator[dict[str, Any]]:
    for module in network.modules():
        if not _has_weight(module):
            yield module.__dict__
            yield module._buffers


def _has_weight(module: nn.Module) -> bool:
    return "weight" in module._parameters or hasattr(module, "in_features")


def _is_plain(value: Any) -> bool:
    return value is None or isinstance(value, (Tensor, bool, int, float))


_MISSING = object()
_OF_TORCH = frozenset(nn.Module().__dict__) | {"forward"}


def _facts(value: Any, name: str, depth: int = 0) -> Iterator[tuple[str, Any]]:
    if isinstance(value, Tensor):
        yield name, fact_of(value)
    elif isinstance(value, (bool, int, float)):
        yield name, value
    elif depth < _DEEPEST:
        for key, item in _items(value):
            if not str(key).startswith("__"):
                yield from _facts(item, f"{name}.{key}", depth + 1)
        if isinstance(value, (list, deque, dict, set)):
            yield f"{name}.length", len(value)


def _items(value: Any) -> list[tuple[Any, Any]]:
    if isinstance(value, Mapping):
        return list(value.items())[:_MOST_ITEMS]
    if isinstance(value, (list, tuple, deque)):
        return list(enumerate(value))[:_MOST_ITEMS]
    if isinstance(value, (nn.Module, type)) or callable(value) or type(value).__module__.split(".")[0] in ("torch", "builtins"):
        return []
    return list(getattr(value, "__dict__", {}).items())[:_MOST_ITEMS]


def fact_of(tensor: Tensor) -> TensorFact:
    """Returns the fact of a tensor. In inference mode this reads its values, which waits for the device."""
    if not tensor.is_inference():
        return TensorFact(tensor, tensor._version)
    try:
        values = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        total = values.sum(dtype=torch.float64 if values.is_floating_point() else torch.int64)
        size = torch.linalg.vector_norm(values) if values.is_floating_point() else total
        return TensorFact(tensor, f"{total.item()} {size.item()}")  # as text, in which NaN equals itself
    except (RuntimeError, NotImplementedError):  # formats that torch cannot add up
        return TensorFact(tensor, 0)

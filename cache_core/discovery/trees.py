"""Tensors inside the tuples, lists and dicts that blocks take and return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]  # index or key at every level
_DEEPEST = 4  # containers inside each other: options of a host may hold half the program


@dataclass(frozen=True)
class Given:
    """In a template: what the call is given at `path` of (args, kwargs)."""

    path: Path


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Everything that is no container, with its path."""
    if len(path) > _DEEPEST:
        return
    if isinstance(value, Mapping):
        for key, item in value.items():
            yield from leaves(item, (*path, key))
    elif _is_row(value):
        for index, item in enumerate(value):
            yield from leaves(item, (*path, index))
    else:
        yield path, value


def tensors(value: Any) -> Iterator[tuple[Path, Tensor]]:
    """Every tensor, with its path."""
    return ((path, leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor))


def at(value: Any, path: Path) -> Any:
    """What lies at `path`. Raises LookupError where there is nothing."""
    for step in path:
        try:
            value = value[step]
        except TypeError as error:
            raise LookupError(f"nothing at {step!r}") from error
    return value


def replaced(value: Any, path: Path, new: Any) -> Any:
    """A copy with `new` at `path`; what does not lie on the way is shared."""
    if not path:
        return new
    if isinstance(value, Mapping):
        return {**value, path[0]: replaced(value[path[0]], path[1:], new)}
    items = list(value)
    items[path[0]] = replaced(items[path[0]], path[1:], new)
    return _row_like(value, items)


def mapped(value: Any, leaf_of: Any, path: Path = ()) -> Any:
    """The same containers with `leaf_of(path, leaf)` for every leaf."""
    if isinstance(value, Mapping):
        return {key: mapped(item, leaf_of, (*path, key)) for key, item in value.items()}
    if _is_row(value):
        return _row_like(value, [mapped(item, leaf_of, (*path, index)) for index, item in enumerate(value)])
    return leaf_of(path, value)


def filled(template: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """A template with what this call is given in its places. Raises LookupError where that is not there."""
    return mapped(template, lambda _path, leaf: at((args, kwargs), leaf.path) if isinstance(leaf, Given) else leaf)


def _is_row(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)


def _row_like(value: Any, items: list) -> Any:
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)

"""Reads and changes the nested tuples, lists and dicts that blocks take and return."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

Path = tuple[Any, ...]  # index or key at every level
_DEEPEST = 4  # levels of containers that are searched: a host's options may hold half the program


@dataclass(frozen=True)
class Given:
    """Stands in a template for what the call is given at `path` of (args, kwargs)."""

    path: Path


def leaves(value: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields everything that is not a container, with its path. What lies inside more than four containers is left out."""
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
    """Returns every tensor with its path, as `leaves` does."""
    return ((path, leaf) for path, leaf in leaves(value) if isinstance(leaf, Tensor))


def at(value: Any, path: Path) -> Any:
    """Returns what lies at `path`.

    Raises:
        LookupError: Where there is nothing.
    """
    for step in path:
        try:
            value = value[step]
        except TypeError as error:
            raise LookupError(f"nothing at {step!r}") from error
    return value


def replaced(value: Any, path: Path, new: Any) -> Any:
    """Returns a copy with `new` at `path`. Containers that are not on the way to it are shared.

    Raises:
        LookupError: Where there is nothing on the way to `path`.
    """
    if not path:
        return new
    if isinstance(value, Mapping):
        return {**value, path[0]: replaced(value[path[0]], path[1:], new)}
    items = list(value)
    items[path[0]] = replaced(items[path[0]], path[1:], new)
    return _row_like(value, items)


def mapped(value: Any, leaf_of: Any, path: Path = ()) -> Any:
    """Returns the same containers with `leaf_of(path, leaf)` in place of every leaf."""
    if isinstance(value, Mapping):
        return {key: mapped(item, leaf_of, (*path, key)) for key, item in value.items()}
    if _is_row(value):
        return _row_like(value, [mapped(item, leaf_of, (*path, index)) for index, item in enumerate(value)])
    return leaf_of(path, value)


def filled(template: Any, args: tuple, kwargs: Mapping[str, Any]) -> Any:
    """Returns a template with what this call is given in place of every `Given`.

    Raises:
        LookupError: Where the call is not given it.
    """
    return mapped(template, lambda _path, leaf: at((args, kwargs), leaf.path) if isinstance(leaf, Given) else leaf)


def _is_row(value: Any) -> bool:
    return isinstance(value, (tuple, list)) and not isinstance(value, torch.Size)


def _row_like(value: Any, items: list) -> Any:
    if isinstance(value, list):
        return items
    return type(value)(*items) if hasattr(value, "_fields") else tuple(items)

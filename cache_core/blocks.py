"""The blocks in a network's lists."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter

from torch import nn


def blocks_of(container: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """The blocks of a ModuleList, ModuleDict or Sequential in order, even where a node has changed how it is iterated over."""
    blocks = container._modules.values() if isinstance(container, nn.Module) else container
    return [block for block in blocks if block is not None]


def blocks_at(network: nn.Module, path: str) -> list[nn.Module]:
    """The same, by the container's dotted path on the network."""
    return blocks_of(attrgetter(path)(network))

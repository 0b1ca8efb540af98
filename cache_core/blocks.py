"""Lists the blocks of a network, and unwraps those that torch.compile wrapped."""

from __future__ import annotations

from collections.abc import Iterable
from operator import attrgetter
from typing import Any

from torch import nn


def blocks_of(container: nn.Module | Iterable[nn.Module]) -> list[nn.Module]:
    """Returns the blocks of a ModuleList, ModuleDict or Sequential in order, even where a node has changed its iteration."""
    blocks = container._modules.values() if isinstance(container, nn.Module) else container
    return [block for block in blocks if block is not None]


def blocks_at(network: nn.Module, path: str) -> list[nn.Module]:
    """Returns the blocks of the container at a dotted path on the network."""
    return blocks_of(attrgetter(path)(network))


def unwrapped(module: Any) -> Any:
    """Returns the module that torch.compile wraps, or the module itself."""
    return getattr(module, "_orig_mod", module)

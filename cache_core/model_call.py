"""What a host says about one call of its model."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import nn

from .planning.kinds import Kind


@dataclass(frozen=True)
class ModelCall:
    """One call of the host's model.

    model: the network that is called. is_copy: whether it holds the weights of the run's own network on another device.
    conds: identity of each cond in the batch, in row order; all have equally many rows.
    signature: shape, dtype and so on: features are only used for calls with an equal one. weights: the same for weights that change
    while sampling (hook LoRAs). variant: options that change what the network computes, by name, to tell passes apart.
    given: shapes of what the network is given beside the latent, such as the text's: what is found out about a call holds for equal ones.
    bypass: why this call must neither use nor fill the cache; "" if it may.
    starting: told the kind each time before the model is run. abandoned: told when that ended half-way, by an exception of the cache's own.
    """

    model: nn.Module
    conds: Sequence[Hashable]
    signature: Hashable
    variant: frozenset[tuple[str, Hashable]] = frozenset()
    given: Hashable = ()
    bypass: str = ""
    weights: Hashable = None
    is_copy: bool = False
    starting: Callable[[Kind], None] = lambda _kind: None
    abandoned: Callable[[], None] = lambda: None

    @property
    def likeness(self) -> Hashable:
        """What is found out about a call of a network holds for those of it for which this is equal."""
        return self.signature, self.given, self.variant, len(self.conds)

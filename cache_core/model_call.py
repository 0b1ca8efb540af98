"""Describes one call of a host's model to the core."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass

from torch import nn

from .planning.kinds import Kind


@dataclass(frozen=True)
class ModelCall:
    """One call of the host's model, as the host describes it.

    Args:
        model: The network that is called.
        conds: Identity of each cond in the batch, in row order. All have the same number of rows.
        signature: Shape, dtype and so on. Features are only used for calls with an equal signature.
        variant: The options that change what the network computes, by name. They tell passes over the same conds apart.
        given: Shapes of what the network is given besides the latent, such as the text. What is found out about a call holds only for
            calls with equal shapes.
        bypass: Why this call must neither use nor fill the cache, "" if it may.
        weights: Identifies weights that change while sampling (hook LoRAs). Features are only used while it is equal.
        is_copy: Whether the network holds the weights of the run's own network on another device.
        starting: Is called with the kind of evaluation each time before the model is run.
        abandoned: Is called when a run of the model ended half-way, by an exception that the cache raised or during a proof.
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
        """Compares equal for calls of a network that have the same place and costs: with equal shapes, options and number of conds."""
        return self.signature, self.given, self.variant, len(self.conds)

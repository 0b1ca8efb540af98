"""Describes one call of the host's model to the engine."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..discovery.place import Place
from ..discovery.places import Known
from ..discovery.trees import Path, tensors
from ..families.shared.base import ModelFamily
from ..overrides import Override, around
from ..store import Unrecorded, memory_ends
from .inputs import ModelInput
from .linear_sites import FactorisedLayers
from .slot import Slot
from .tokens import TokenSelection


@dataclass
class EngineCall:
    """A model call over the rows of one or more conds, in order. Every cond has the same number of rows.

    Args:
        model: The network that is called.
        known: What was found out about such calls, above all the place of the hidden state.
        family: What is known of the model besides.
        slots: One slot for each cond, or one for all where the place is joint.
        time: The model's time (0..1) of this evaluation.
        selection: The tokens that a conservative evaluation recomputes.
        on_enter: Is called with this call when the first block is reached.
        keeps_sublayers: Whether a full evaluation keeps the outputs of sublayers.
        given: The model's input, for a predictor that uses it. Hidden states are then kept minus the embedded input, and the input is
            kept beside them. None for all other predictors.
        layers: The linear layers of an incremental evaluation, or of a full one that keeps what those need. None for all others.
        rests: Keys of the sublayers that do not run in this full evaluation: their kept output is used (see `families.shared.base.Site`).
        unrecorded: Context around the allocation of what outlives a block (see `store.Unrecorded`).
        keeps_hidden: Whether copies of the last hidden state stay in `hidden` too, for a proof.
        is_trial: Whether a conservative evaluation leaves the kept features as they are.
        is_touched: Filled in: whether a block of the place was reached. If not, another node's wrapper answered the call.
        is_finished: Filled in: whether the last block was left. If it was not, but blocks were reached, another node had replaced one.
        hidden: Filled in: the copies for a proof, (B, L, C) for each tensor that the place keeps.
        sketches: What the answering block was given in the proof before, for the first skip (see `discovery.persistence`).
        device: Filled in: the device of what the first block is given.
    """

    model: nn.Module
    known: Known
    family: ModelFamily
    slots: Sequence[Slot]
    time: float
    selection: TokenSelection
    on_enter: Callable[[EngineCall], None] = lambda _call: None
    keeps_sublayers: bool = False
    given: ModelInput | None = None
    layers: FactorisedLayers | None = None
    rests: frozenset[str] = frozenset()
    unrecorded: Unrecorded = nullcontext
    keeps_hidden: bool = False
    is_trial: bool = False
    is_touched: bool = False
    is_finished: bool = False
    hidden: Sequence[Tensor] = ()
    sketches: Mapping[Path, Tensor] = field(default_factory=dict)
    device: torch.device = torch.device("cpu")

    def __post_init__(self) -> None:
        assert self.known.place is not None, "calls of a model without a place go past the cache"
        self.place: Place = self.known.place
        self.first_block = self.place.block(self.model, self.place.first)
        self.last_block = self.place.block(self.model, self.place.last)

    def entry(self) -> list[Override]:
        """Returns the overrides that evaluations of every kind need.

        They call `on_enter` when the first block is reached, and note the model's input where it is used.
        """
        if self.given is None or not self.family.embed:
            return [(self.first_block, around(before=self._enter))]
        entered = self.family.stacks[0].blocks(self.model)[0]  # other lists of blocks may run before the input is seen
        return [*self.given.overrides(), (entered, around(before=self._enter))]

    def _enter(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.is_touched = True
        self.device = next((tensor.device for _, tensor in tensors((args, kwargs))), self.device)
        self.on_enter(self)

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """Returns the rows of each slot, as views."""
        return list(tensor.chunk(len(self.slots)))

    def remember_hidden(self, result: Any) -> None:
        """Keeps the hidden state. Is called with the result of the last block."""
        self.is_touched = True
        hidden = self.place.hidden(result)
        if self.keeps_hidden:
            with memory_ends(), self.unrecorded():
                self.hidden = [tensor.clone() for tensor in hidden]
        self.keep(hidden)

    def is_answered(self, _result: Any) -> None:
        """Notes that the last block was left, where its hidden state is not kept. Is called with the block's result."""
        self.is_finished = True

    def keep(self, hidden: Sequence[Tensor]) -> None:
        """Keeps a hidden state in the slots, given as (B, L, C) for each tensor that the place keeps."""
        inputs: Sequence[Tensor | None] = [None] * len(self.slots)
        if self.given is not None:
            inputs = self.rows(self.given.tokens(hidden[0], self.place))
            hidden = [self.given.without(hidden[0], self.place), *hidden[1:]]
        for slot, tokens, *own in zip(self.slots, inputs, *(self.rows(tensor) for tensor in hidden), strict=True):
            slot.remember_hidden(self.time, own, tokens)
        self.is_finished = True

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the activations."""
        return self.place.kept[0].dtype

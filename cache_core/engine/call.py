"""One call of the host's model, as the engine sees it."""

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
from ..families.base import ModelFamily
from ..overrides import Override, around
from ..store import Unrecorded, memory_ends
from .inputs import ModelInput
from .linear_sites import FactorisedLayers
from .slot import Slot
from .tokens import TokenSelection


@dataclass
class EngineCall:
    """A model call over the rows of one or more conds, in order; every cond has the same number of rows.

    known: what was found out about such calls, the place of the hidden state first of all. family: what is known of the model beside it.
    slots: of every cond, or one of all where the place is joint. time: the model's time coordinate of this evaluation.
    keeps_sublayers: whether a full evaluation keeps them.
    given: the model's input, where hidden states are kept without what it is embedded as and it is kept beside them; else None.
    layers: of an incremental evaluation, or of a full one that keeps what those need; None for all others.
    rests: sublayers that a full evaluation leaves out, by name, as they are computed in only some of them.
    on_enter: told this call when the first block is reached. unrecorded: around the allocation of what outlives a block (see
    `store.Unrecorded`). keeps_hidden: whether copies of the last hidden state stay here too, for a proof.
    is_trial: whether a conservative evaluation is to leave what is kept as it is.
    is_touched, is_finished: filled in while the blocks run. A call that touched neither the first nor the
    last block was answered by someone else's wrapper; one that did but did not finish met someone else's patch.
    hidden: the copies. sketches: of what the answering block was given in a proof before, for the first skip (see `persistence`).
    device: of what the first block is given.
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
        """What every kind of evaluation listens to: the arrival at the first block, and the model's input where it is used."""
        if self.given is None or not self.family.embed:
            return [(self.first_block, around(before=self._enter))]
        entered = self.family.stacks[0].blocks(self.model)[0]  # other lists may run before the input is seen
        return [*self.given.overrides(), (entered, around(before=self._enter))]

    def _enter(self, args: tuple, kwargs: dict[str, Any]) -> None:
        self.is_touched = True
        self.device = next((tensor.device for _, tensor in tensors((args, kwargs))), self.device)
        self.on_enter(self)

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each slot, as views."""
        return list(tensor.chunk(len(self.slots)))

    def remember_hidden(self, result: Any) -> None:
        """To be told the result of the last block: keeps its hidden state."""
        self.is_touched = True
        hidden = self.place.hidden(result)
        if self.keeps_hidden:
            with memory_ends(), self.unrecorded():
                self.hidden = [tensor.clone() for tensor in hidden]
        self.keep(hidden)

    def is_answered(self, _result: Any) -> None:
        """To be told that the last block was left, where nothing is to be kept."""
        self.is_finished = True

    def keep(self, hidden: Sequence[Tensor]) -> None:
        """Keeps a hidden state, (B, L, C) for each tensor that the place keeps."""
        inputs: Sequence[Tensor | None] = [None] * len(self.slots)
        if self.given is not None:
            inputs = self.rows(self.given.tokens(hidden[0], self.place))
            hidden = [self.given.without(hidden[0], self.place), *hidden[1:]]
        for slot, tokens, *own in zip(self.slots, inputs, *(self.rows(tensor) for tensor in hidden), strict=True):
            slot.remember_hidden(self.time, own, tokens)
        self.is_finished = True

    @property
    def dtype(self) -> torch.dtype:
        """Of activations."""
        return self.place.kept[0].dtype

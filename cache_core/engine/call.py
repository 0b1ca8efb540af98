"""One call of the host's model, as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..families.base import ModelFamily, Stack, UnknownInputError, split_lengths, stream_slice
from ..store import Unrecorded
from .linear_sites import CalibratedLinears
from .overrides import Forward, Override, around
from .slot import Slot
from .tokens import TokenChoice


@dataclass
class EngineCall:
    """A model call over the rows of one or more conds, in order; every cond has the same number of rows.

    time: the model's time coordinate of this evaluation. keeps_sublayers: whether a full evaluation keeps them.
    keeps_input: whether hidden states are kept without the embedded input, and the input tokens beside them.
    linears: of a calibrated evaluation, or of a full one that keeps what those need; None for all others.
    rests: whether a full evaluation leaves out sublayers that are computed in only some of them. saved_macs: of a batch row, by that.
    on_enter: told this call and the first stream (B, L, C) when the first block is reached.
    unrecorded: around the allocation of what outlives a block (see `store.Unrecorded`).
    measured: tokens of the streams that the family measures before the blocks.
    lengths, is_touched, is_finished: filled in while the blocks run. A call that touched neither the first nor the
    last block was answered by someone else's wrapper; one that did but did not finish met someone else's patch.
    """

    model: nn.Module
    family: ModelFamily
    slots: Sequence[Slot]
    time: float
    choice: TokenChoice
    keeps_sublayers: bool
    keeps_input: bool
    on_enter: Callable[[EngineCall, Tensor], None]
    linears: CalibratedLinears | None = None
    rests: bool = False
    unrecorded: Unrecorded = nullcontext
    measured: dict[str, int] = field(default_factory=dict)
    lengths: dict[str, int] = field(default_factory=dict)
    saved_macs: float = 0.0
    is_touched: bool = False
    is_finished: bool = False
    input: Tensor | None = None
    embedded: Tensor | None = None

    def __post_init__(self) -> None:
        self.placed = self.family.placed(self.model)
        self.last_stack = self.placed[-1][0]

    def entry(self) -> list[Override]:
        """What every kind of evaluation listens to: the model's input where it is used, and the arrival at the first block."""
        overrides = [(self.placed[0][2], around(before=self.enter))]
        overrides += [(attrgetter(path)(self.model), self._measuring(stream)) for path, stream in self.family.measures.items()]
        if self.keeps_input:
            embed = attrgetter(self.family.embed)(self.model)
            overrides.append((embed, around(before=lambda args, _kwargs: self._note_input(embed, args[0]))))
        return overrides

    def _measuring(self, stream: str) -> Callable[[Forward], Forward]:
        def measure(args: tuple, _kwargs: dict[str, Any]) -> None:
            self.measured[stream] = self.measured.get(stream, 0) + args[0].shape[1]  # reference pictures may come in one by one

        return around(before=measure)

    def _note_input(self, embed: nn.Module, given: Tensor) -> None:
        with self.unrecorded():
            self.input = self.family.tokens(embed, given).clone()  # some linears clamp what they are given in place

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """To be told the arguments of the first block: notes the stream lengths."""
        stack = self.placed[0][0]
        streams = stack.inputs(args, kwargs)
        self.lengths = split_lengths(stack.lengths(args, kwargs), self.measured)
        self.measured.clear()  # should someone's wrapper run the model twice
        self.is_touched = True
        if not self.lengths:
            return  # someone else answered for what is measured: as if the last block had been replaced
        if self.keeps_input:
            index, place = _find(stack, self.family.hidden, self.lengths)
            with self.unrecorded():
                self.embedded = stack.flat(streams[index])[:, place].clone()  # blocks write into it
            if self.input is None or self.input.shape[1] != self.embedded.shape[1]:
                raise UnknownInputError("tokens are added between the model's input and its blocks")
        self.on_enter(self, stack.flat(streams[0]))

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each slot, as views."""
        return list(tensor.chunk(len(self.slots)))

    def remember_hidden(self, result: Any) -> None:
        """To be told the result of the last block: keeps its hidden state."""
        self.is_touched = True
        if not self.lengths:
            return
        tensors = self.last_stack.returned(result)
        index, place = self.hidden_place()
        hidden = self.last_stack.flat(tensors[index])[:, place]
        if self.embedded is None or self.input is None:
            for slot, rows in zip(self.slots, self.rows(hidden)):
                slot.remember_hidden(self.time, rows)
        else:
            for slot, rows, tokens in zip(self.slots, self.rows(hidden - self.embedded), self.rows(self.input)):
                slot.remember_hidden(self.time, rows, tokens)
        self.is_finished = True

    def hidden_place(self) -> tuple[int, slice]:
        """Which of the last stack's streams holds the hidden state, and where in it."""
        return _find(self.last_stack, self.family.hidden, self.lengths)


def _find(stack: Stack, wanted: str, lengths: dict[str, int]) -> tuple[int, slice]:
    for index, stream in enumerate(stack.streams.values()):
        if wanted in stream.split("+"):
            return index, stream_slice(wanted, stream, lengths)
    raise KeyError(f"no {wanted} stream in {stack.path}")

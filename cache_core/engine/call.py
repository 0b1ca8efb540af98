"""One call of the host's model, as the engine sees it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..families.base import ModelFamily, Stack, stream_lengths, stream_slice
from .slot import Slot
from .tokens import TokenChoice


@dataclass
class EngineCall:
    """A model call over the rows of one or more conds, in order; every cond has the same number of rows.

    time: the model's time coordinate of this evaluation. keeps_sublayers: whether a full evaluation keeps them.
    on_enter: told this call and the first stream (B, L, C) when the first block is reached.
    lengths, is_touched, is_finished: filled in while the blocks run. A call that touched neither the first nor the
    last block was answered by someone else's wrapper; one that did but did not finish met someone else's patch.
    """

    model: nn.Module
    family: ModelFamily
    slots: Sequence[Slot]
    time: float
    choice: TokenChoice
    keeps_sublayers: bool
    on_enter: Callable[[EngineCall, Tensor], None]
    lengths: dict[str, int] = field(default_factory=dict)
    is_touched: bool = False
    is_finished: bool = False

    def __post_init__(self) -> None:
        self.placed = self.family.placed(self.model)
        self.last_stack = self.placed[-1][0]

    def enter(self, args: tuple, kwargs: dict[str, Any]) -> None:
        """To be told the arguments of the first block: notes the stream lengths."""
        stack = self.placed[0][0]
        streams = stack.inputs(args, kwargs)
        self.lengths = stream_lengths(stack, streams)
        self.is_touched = True
        self.on_enter(self, streams[0])

    def rows(self, tensor: Tensor) -> list[Tensor]:
        """The rows of each slot, as views."""
        return list(tensor.chunk(len(self.slots)))

    def remember_hidden(self, result: Any) -> None:
        """To be told the result of the last block: keeps its hidden state."""
        self.is_touched = True
        if not self.lengths:
            return
        tensors = result if isinstance(result, tuple) else (result,)
        index, place = self.hidden_place()
        for slot, rows in zip(self.slots, self.rows(tensors[index][:, place])):
            slot.remember_hidden(self.time, rows)
        self.is_finished = True

    def hidden_place(self) -> tuple[int, slice]:
        """Which of the last stack's streams holds the hidden state, and where in it."""
        return _find(self.last_stack, self.family.hidden, self.lengths)


def _find(stack: Stack, wanted: str, lengths: dict[str, int]) -> tuple[int, slice]:
    for index, stream in enumerate(stack.streams.values()):
        if wanted in stream.split("+"):
            return index, stream_slice(wanted, stream, lengths)
    raise KeyError(f"no {wanted} stream in {stack.path}")

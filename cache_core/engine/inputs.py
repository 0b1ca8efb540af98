"""Notes the model's input, for forecasts of the hidden state that are corrected by how the input really moved."""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..discovery.place import Kept, Place
from ..families.shared.base import ModelFamily
from ..overrides import Override, around
from ..refusals import UnknownInputError
from ..store import Unrecorded


class ModelInput:
    """Notes one call's input tokens (B, L, d), and the embedded tokens (B, L, C) as they enter the family's first block.

    Where the family does not say where they enter, the input has no channels and there is no embedded input.

    Args:
        family: Says where the input enters (`ModelFamily.embed`).
        model: The network.
        unrecorded: See `store.Unrecorded`.

    Attributes:
        embedded: The embedded tokens (B, L, C), None before the family's first block was reached.
    """

    def __init__(self, family: ModelFamily, model: nn.Module, unrecorded: Unrecorded) -> None:
        self._family, self._model, self._unrecorded = family, model, unrecorded
        self._given: Tensor | None = None
        self.embedded: Tensor | None = None

    def overrides(self) -> list[Override]:
        """Returns the overrides that note the input, for the length of the call."""
        if not self._family.embed:
            return []
        stack, embed = self._family.stacks[0], attrgetter(self._family.embed)(self._model)

        def note_input(args: tuple, _kwargs: dict[str, Any]) -> None:
            with self._unrecorded():
                self._given = self._family.tokens(embed, args[0]).clone()  # some linear layers clamp their input in place

        def note_embedded(args: tuple, kwargs: dict[str, Any]) -> None:
            with self._unrecorded():
                self.embedded = stack.flat(stack.stream(self._family.hidden, args, kwargs)).clone()  # blocks write into it

        return [(embed, around(before=note_input)), (stack.blocks(self._model)[0], around(before=note_embedded))]

    def tokens(self, hidden: Tensor, place: Place) -> Tensor:
        """Returns the input (B, L, d) of the tokens of a hidden state (B, L, C).

        Raises:
            UnknownInputError: Where the input was not seen, or has other tokens.
        """
        if not self._family.embed:
            return hidden[..., :0]
        if self._given is None:
            raise UnknownInputError("the model's input layer did not run as expected")
        return _alike(self._given, hidden, place.kept[0])

    def without(self, hidden: Tensor, place: Place) -> Tensor:
        """Returns a hidden state (B, L, C) minus the embedded input.

        Raises:
            UnknownInputError: Where the embedded input was not seen, or has another shape.
        """
        embedded = self._of(hidden, place)
        return hidden if embedded is None else hidden - embedded

    def added(self, hidden: Tensor, place: Place) -> Tensor:
        """Returns a hidden state (B, L, C) plus the embedded input. Raises UnknownInputError as `without` does."""
        embedded = self._of(hidden, place)
        return hidden if embedded is None else hidden + embedded

    @property
    def channels(self) -> int:
        """Channels d of the input, 0 before it was seen."""
        return 0 if self._given is None else self._given.shape[-1]

    def _of(self, hidden: Tensor, place: Place) -> Tensor | None:
        if not self._family.embed:
            return None
        if self.embedded is None:
            raise UnknownInputError("the model's first block did not run as expected")
        embedded = _alike(self.embedded, hidden, place.kept[0])
        if embedded.shape != hidden.shape:
            raise UnknownInputError("the model's blocks change the number of channels")
        return embedded


def _alike(tokens: Tensor, hidden: Tensor, kept: Kept) -> Tensor:
    """Selects, from the tokens (B, L, …) that enter the blocks, those that the hidden state keeps.

    The hidden state is part of a stream that may hold text besides, already at the first block or only after the blocks. In the latter
    case, the tokens that it lacks at its end are references or padding.

    Raises:
        UnknownInputError: Where the numbers of rows or tokens do not fit.
    """
    rows, length = hidden.shape[:2]
    others = 0 if kept.tokens is None else kept.shape[1] - tokens.shape[1]
    if tokens.shape[0] == rows and tokens.shape[1] != length and kept.tokens is not None:
        if others == 0:  # joint with other tokens from the first block on
            tokens = tokens[:, kept.tokens]
        elif others > 0 and kept.tokens.start in (0, others):
            tokens = tokens[:, :length]
    if tokens.shape[:2] != hidden.shape[:2]:
        raise UnknownInputError("tokens are added between the model's input and its blocks")
    return tokens

"""Describes where a network's hidden state is put in: which blocks hand on what they are given, and which one answers with it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..blocks import blocks_at
from ..overrides import Forward, Override
from ..refusals import UnsupportedCallError
from ..store import Unrecorded
from .trees import Path, at, filled, replaced

Answer = Callable[[list[Tensor | None]], Sequence[Tensor]]  # from what the answering block is given to what takes its place


@dataclass(frozen=True)
class LeftOut:
    """Stands in place of a template for a block that was not called, so that its result is not known.

    Guidance such as SLG leaves blocks out.
    """


@dataclass(frozen=True)
class Passed:
    """A list of blocks that a skip does not run.

    Args:
        path: Dotted path of the list on the network, "" where the network itself is the only block.
        templates: For every block, what it returns instead, with `trees.Given` where it hands on what it was given; or `LeftOut`.
        first: Index of the block that is called first.
        last: Index of the block that is called last.
    """

    path: str
    templates: tuple[Any, ...]
    first: int = 0
    last: int = 0

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return blocks_at(network, self.path) if self.path else [network]


@dataclass(frozen=True)
class Kept:
    """One tensor of the answering block's result that is kept, as tokens (B, L, C).

    Args:
        out: Its path in the result.
        like: Path in (args, kwargs) of the given tensor that it replaces, None where none of its shape is given.
        shape: Shape of the whole tensor.
        dtype: Its dtype.
        rows: Axis of the batch. None where conds cannot be told apart: the whole tensor is one row then.
        tokens: Part of axis 1 that is kept, None for all of it. The other tokens are handed on as given.
    """

    out: Path
    like: Path | None
    shape: torch.Size
    dtype: torch.dtype
    rows: int | None = 0
    tokens: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """Returns the part of `tensor` that is kept, (B, L, C), as a view where possible.

        Raises:
            UnsupportedCallError: Where the tensor has another shape.
        """
        if tensor.shape != self.shape:
            raise UnsupportedCallError("other numbers of tokens")
        ordered = tensor.unsqueeze(0) if self.rows is None else tensor.movedim(self.rows, 0)
        flat = ordered.flatten(1, -2) if ordered.ndim > 3 else ordered
        flat = flat.unsqueeze(1) if flat.ndim == 2 else flat
        return flat if self.tokens is None else flat[:, self.tokens]

    @property
    def rows_and_tokens(self) -> int:
        """B · L of the part that is kept."""
        total = self.shape.numel() // self.shape[-1]
        return total if self.tokens is None else total // self.shape[1] * (self.tokens.stop - self.tokens.start)

    def uncut(self, part: Tensor, given: Tensor | None) -> Tensor:
        """Returns the whole tensor to answer with.

        Args:
            part: The kept part (B, L, C), as `of` returns it.
            given: The tensor that the block was given in its place, None where there is none.

        Raises:
            UnsupportedCallError: Where `given` has another shape.
        """
        if given is not None and given.shape != self.shape:
            raise UnsupportedCallError("other numbers of tokens")
        if self.tokens is not None and given is not None:
            return torch.cat((given[:, : self.tokens.start], part, given[:, self.tokens.stop :]), dim=1)
        if self.rows is None:
            return part.reshape(self.shape)
        moved = [size for axis, size in enumerate(self.shape) if axis != self.rows]
        return part.reshape(self.shape[self.rows], *moved).movedim(0, self.rows)


class Position(NamedTuple):
    """A block, by the path of its list and its index there."""

    path: str
    number: int


@dataclass(frozen=True)
class Place:
    """Where the hidden state of one network lies, for calls that are alike. It holds no modules and no tensors.

    Args:
        passed: All lists of blocks that a skip leaves out, in running order. The last block of the last list answers.
        first: The block that is reached first.
        kept: The tensors that are kept of the answering block's result.
        reason: Why only the whole output can be kept, "" where a place inside the network was proved.
        is_joint: Whether the conds of one call share what is kept, as they cannot be told apart.
    """

    passed: tuple[Passed, ...]
    first: Position
    kept: tuple[Kept, ...]
    reason: str = ""
    is_joint: bool = False

    @property
    def last(self) -> Position:
        """The block that answers."""
        return Position(self.passed[-1].path, self.passed[-1].last)

    @property
    def is_whole_output(self) -> bool:
        """Whether only the network's output is kept. This is the last resort, and the user is notified of it."""
        return not self.passed[-1].path

    @property
    def text(self) -> str:
        """The place in words, for reports."""
        if self.is_whole_output:
            return f"whole output ({self.reason})"
        return f"found and proved: skips {', '.join(passed.path for passed in self.passed)}"

    def block(self, network: nn.Module, position: Position) -> nn.Module:
        return next(passed for passed in self.passed if passed.path == position.path).blocks(network)[position.number]

    def since(self, path: str) -> Place:
        """Returns the same place without the lists that run before the one at `path`, for when their results are needed."""
        paths = [passed.path for passed in self.passed]
        if path not in paths:
            return self
        passed = self.passed[paths.index(path) :]
        return replace(self, passed=passed, first=Position(passed[0].path, passed[0].first))

    def hidden(self, result: Any) -> list[Tensor]:
        """Returns the kept tensors of the answering block's result, each (B, L, C).

        Raises:
            UnsupportedCallError: Where one is missing or has another shape.
        """
        try:
            return [kept.of(at(result, kept.out)) for kept in self.kept]
        except LookupError as error:
            raise UnsupportedCallError(f"{self.last.path} returns something else") from error

    def skip(
        self, network: nn.Module, answer: Answer, unrecorded: Unrecorded, reached: Callable[[], None] = lambda: None
    ) -> list[Override]:
        """Returns the overrides of a skipped evaluation.

        Args:
            network: The network that the place was found in.
            answer: Is called with what the answering block is given in place of every kept tensor, and returns what to put there.
            unrecorded: Context around what is allocated in the answering block (see `store.Unrecorded`).
            reached: Is called whenever another block is reached.

        Raises:
            UnsupportedCallError: In the network's call, where a block gets other arguments or shapes than when the place was found.
        """
        overrides: list[Override] = []
        for passed in self.passed:
            for index, (block, template) in enumerate(zip(passed.blocks(network), passed.templates, strict=True)):
                is_last = Position(passed.path, index) == self.last
                overrides.append((block, self._answering(template, answer, unrecorded) if is_last else _passing(template, reached)))
        return overrides

    def _answering(self, template: Any, answer: Answer, unrecorded: Unrecorded) -> Callable[[Forward], Forward]:
        def answered(*args: Any, **kwargs: Any) -> Any:
            self._check_control(args, kwargs)
            try:
                given = [None if kept.like is None else at((args, kwargs), kept.like) for kept in self.kept]
                result = filled(template, args, kwargs)
            except LookupError as error:
                raise UnsupportedCallError(f"{self.last.path} is called with other arguments") from error
            with unrecorded():
                for kept, part, own in zip(self.kept, answer(given), given, strict=True):
                    result = replaced(result, kept.out, kept.uncut(part, own))
            return result

        return lambda _forward: answered

    def _check_control(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """Refuses a ControlNet where the whole network is skipped.

        It may be switched on or off between evaluations, which such a skip would not see.
        """
        if self.is_whole_output and any(_is_control(value) for value in (kwargs.get("control"), *args)):
            raise UnsupportedCallError("a ControlNet, which a skipped evaluation would not see")


def _passing(template: Any, reached: Callable[[], None]) -> Callable[[Forward], Forward]:
    def passed(*args: Any, **kwargs: Any) -> Any:
        reached()
        if isinstance(template, LeftOut):
            raise UnsupportedCallError("a block runs that did not run before")
        try:
            return filled(template, args, kwargs)
        except LookupError as error:
            raise UnsupportedCallError("a block is called with other arguments") from error

    return lambda _forward: passed


def _is_control(value: Any) -> bool:
    """Returns whether a value has the host's form of ControlNet residuals: lists of tensors by where they are added."""
    return isinstance(value, Mapping) and any(
        isinstance(item, list) and name in ("input", "middle", "output") for name, item in value.items()
    )

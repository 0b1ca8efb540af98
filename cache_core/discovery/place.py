"""Where a network's hidden state is put in: which blocks pass on what they are given, and which one answers with what was kept."""

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

Answer = Callable[[list[Tensor | None]], Sequence[Tensor]]


@dataclass(frozen=True)
class LeftOut:
    """In place of a template: the block was not called, so what it returns is not known. Guidance leaves layers out (SLG)."""


@dataclass(frozen=True)
class Passed:
    """A list of blocks that a skip does not run. path: of the list on the network, "" for the network itself as the only block.

    templates: of every block, what it returns instead: `trees.Given` where it hands on what it was given, or `LeftOut`. first, last: by
    order of calls.
    """

    path: str
    templates: tuple[Any, ...]
    first: int = 0
    last: int = 0

    def blocks(self, network: nn.Module) -> list[nn.Module]:
        return blocks_at(network, self.path) if self.path else [network]


@dataclass(frozen=True)
class Kept:
    """One tensor that is kept of the answering block's result, as tokens (B, L, C).

    out: its path there. like: path in (args, kwargs) of the tensor whose place it takes, None where there is none of its shape.
    shape, dtype: of the whole tensor. rows: axis of the batch, None where conds cannot be told apart: all is one row then.
    tokens: the part of axis 1 that is kept, None for all; the rest is handed on as given.
    """

    out: Path
    like: Path | None
    shape: torch.Size
    dtype: torch.dtype
    rows: int | None = 0
    tokens: slice | None = None

    def of(self, tensor: Tensor) -> Tensor:
        """What is kept of the tensor, (B, L, C): a view where that is possible. Raises UnsupportedCallError for another shape."""
        if tensor.shape != self.shape:
            raise UnsupportedCallError("other numbers of tokens")
        ordered = tensor.unsqueeze(0) if self.rows is None else tensor.movedim(self.rows, 0)
        flat = ordered.flatten(1, -2) if ordered.ndim > 3 else ordered
        flat = flat.unsqueeze(1) if flat.ndim == 2 else flat
        return flat if self.tokens is None else flat[:, self.tokens]

    @property
    def rows_and_tokens(self) -> int:
        """B·L of what is kept."""
        total = self.shape.numel() // self.shape[-1]
        return total if self.tokens is None else total // self.shape[1] * (self.tokens.stop - self.tokens.start)

    def whole(self, part: Tensor, given: Tensor | None) -> Tensor:
        """The tensor to answer with. part: what `of` gives. given: what the block was given in its place."""
        if given is not None and given.shape != self.shape:
            raise UnsupportedCallError("other numbers of tokens")
        if self.tokens is not None and given is not None:
            return torch.cat((given[:, : self.tokens.start], part, given[:, self.tokens.stop :]), dim=1)
        if self.rows is None:
            return part.reshape(self.shape)
        moved = [size for axis, size in enumerate(self.shape) if axis != self.rows]
        return part.reshape(self.shape[self.rows], *moved).movedim(0, self.rows)


class Position(NamedTuple):
    """A block: its list and its number there."""

    path: str
    number: int


@dataclass(frozen=True)
class Place:
    """Found for one network and one signature of its calls. It holds no modules and no tensors.

    passed: all lists that a skip leaves out, in running order; the last one answers. first: the block that is reached first.
    last: the one that answers. kept: what of its result. reason: why only the whole output can be kept, "" where a place inside was
    proved. is_joint: conds of one call share what is kept and cannot be told apart.
    """

    passed: tuple[Passed, ...]
    first: Position
    kept: tuple[Kept, ...]
    reason: str = ""
    is_joint: bool = False

    @property
    def last(self) -> Position:
        return Position(self.passed[-1].path, self.passed[-1].last)

    @property
    def is_whole_output(self) -> bool:
        """Whether nothing but the network's output is kept: the last resort, which the user is told of."""
        return not self.passed[-1].path

    @property
    def text(self) -> str:
        """For reports."""
        if self.is_whole_output:
            return f"whole output ({self.reason})"
        return f"found and proved: skips {', '.join(passed.path for passed in self.passed)}"

    def block(self, network: nn.Module, position: Position) -> nn.Module:
        return next(passed for passed in self.passed if passed.path == position.path).blocks(network)[position.number]

    def since(self, path: str) -> Place:
        """The same without the lists that run before the one at `path`: what they make is needed."""
        paths = [passed.path for passed in self.passed]
        if path not in paths:
            return self
        passed = self.passed[paths.index(path) :]
        return replace(self, passed=passed, first=Position(passed[0].path, passed[0].first))

    def hidden(self, result: Any) -> list[Tensor]:
        """What is kept of the answering block's result, each (B, L, C). Raises UnsupportedCallError where it is not there."""
        try:
            return [kept.of(at(result, kept.out)) for kept in self.kept]
        except LookupError as error:
            raise UnsupportedCallError(f"{self.last.path} returns something else") from error

    def skip(
        self, network: nn.Module, answer: Answer, unrecorded: Unrecorded, reached: Callable[[], None] = lambda: None
    ) -> list[Override]:
        """A skipped evaluation. answer: given what the answering block is given in the place of every kept tensor, what to put there.

        unrecorded: around what is allocated in the answering block (see `store.Unrecorded`). reached: told of every other block.
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
                    result = replaced(result, kept.out, kept.whole(part, own))
            return result

        return lambda _forward: answered

    def _check_control(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        """A ControlNet may be switched on or off between evaluations; a network that is answered for as a whole would not see it."""
        if self.is_whole_output and any(_is_control(value) for value in (kwargs.get("control"), *args)):
            raise UnsupportedCallError("a ControlNet, which a skipped evaluation would not see")


def _passing(template: Any, reached: Callable[[], None]) -> Callable[[Forward], Forward]:
    def passed(*args: Any, **kwargs: Any) -> Any:
        reached()
        if isinstance(template, LeftOut):
            raise UnsupportedCallError("a block is called that was left out before")
        try:
            return filled(template, args, kwargs)
        except LookupError as error:
            raise UnsupportedCallError("a block is called with other arguments") from error

    return lambda _forward: passed


def _is_control(value: Any) -> bool:
    """The host's form: lists of tensors by where they are added."""
    return isinstance(value, Mapping) and any(
        isinstance(item, list) and name in ("input", "middle", "output") for name, item in value.items()
    )

"""Proves a place by skipping: with the hidden state of an evaluation put back, the network must answer as it did in that evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from itertools import combinations, islice, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..overrides import forward_overrides, uncompiled
from ..refusals import UnsupportedCallError
from .flops import counted
from .place import Kept, Passed, Place, Site
from .stacks import Stack, stack_of
from .trees import Path, mapped, tensors
from .watch import Watched

_MOST_LEFT = 0.8  # of a full evaluation's multiply-adds that a skip may cost: with more, little is gained for what is lost
_WORTH = 0.2  # of them, before what a later stack would save is worth keeping more
_MOST_AXES = 6  # places of the batch that are tried
Hidden = dict[Path, Tensor]  # what the answering block gave, by path
FAILURES = (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, NotImplementedError, UnsupportedCallError)


class Found(NamedTuple):
    """place: None where nothing of the network may be cached, with the `reason`. skip_macs: of a skipped evaluation.

    is_lasting: whether that can be relied on in calls to come.
    """

    place: Place | None
    hidden: Sequence[Tensor] = ()
    reason: str = ""
    skip_macs: float = 0.0
    is_lasting: bool = True


def is_equal(one: Any, other: Any, dtype: torch.dtype) -> bool:
    """Whether two answers differ by no more than rounding in `dtype`, measured against their spread. Waits for the device."""
    ours, theirs = list(tensors(one)), list(tensors(other))
    if [path for path, _ in ours] != [path for path, _ in theirs]:
        return False
    return all(_is_close(a, b, dtype) for (_, a), (_, b) in zip(ours, theirs))


def _is_close(a: Tensor, b: Tensor, dtype: torch.dtype) -> bool:
    if a.shape != b.shape:
        return False
    if torch.equal(a, b):
        return True
    eps = max(torch.finfo(kind).eps for kind in (a.dtype, dtype) if kind.is_floating_point)
    spread = float(a.float().std()) if a.numel() > 1 else float(a.float().abs().max())
    return float((a.float() - b.float()).square().mean().sqrt()) <= max(1e-5, 2.5 * eps) * spread  # False for what is not finite


class Prover:
    """Of one network, in one full evaluation. compute: runs it again on the same inputs. answer: what it returned. conds: in the call."""

    def __init__(self, network: nn.Module, compute: Callable[[], Any], answer: Any, conds: int) -> None:
        self._network, self._compute, self._answer, self._conds = network, compute, answer, conds
        self.rows = next(tensor.shape[0] for _, tensor in tensors(answer))

    def skipped(self, place: Place, hidden: Sequence[Tensor]) -> Any:
        """The network's answer with `hidden`, one tensor for each that the place keeps, put in."""
        with forward_overrides(place.skip(self._network, lambda _given: [tensor.clone() for tensor in hidden])):
            return self._compute()

    def holds(self, place: Place, hidden: Sequence[Tensor]) -> bool:
        """Whether the place is proved here. Random numbers that the network draws meanwhile are given back."""
        return self._is_same(self._tried(place, hidden), hidden)

    def find(self, watched: Watched) -> Found:
        """The best place that is proved; else the network's whole output, or none where that would be wrong."""
        states = [f"{entry.path}.{entry.changed}" for entry in watched.lists if entry.changed]
        if states:
            return Found(None, reason=f"its blocks remember what they saw ({states[0]})")
        if not all(bool(torch.isfinite(tensor).all()) for _, tensor in tensors(self._answer)):
            return Found(None, reason="its answer is not finite", is_lasting=False)
        stacks = [stack for entry in watched.lists if (stack := stack_of(entry)) is not None]
        if not stacks:
            return Found(None, reason="no list of blocks runs once and in turn")
        lengths = sorted(watched.lengths, reverse=True)
        for chosen in _choices(stacks):
            found = self._found(chosen, watched.macs, lengths)
            if found is not None:
                return found
        with own_random_numbers():
            again = self._compute()
        if not is_equal(self._answer, again, torch.float32):
            return Found(None, reason="it does not answer the same twice")
        return self._whole(watched, "a skip that puts its hidden state back does not answer the same")

    # -- one choice of stacks ---------------------------------------------------------------------------

    def _found(self, chosen: list[Stack], macs: float, lengths: list[int]) -> Found | None:
        """The place that leaves these stacks out, with no more kept than the answer needs; None where it is not proved or saves little."""
        answering = _answering(chosen, macs)
        stacks = sorted((stack for stack in chosen if stack.ends <= answering.ends), key=lambda stack: stack.starts)
        if macs - sum(stack.macs for stack in stacks) > _MOST_LEFT * macs:
            return None
        passed = tuple(stack.passed for stack in stacks if stack is not answering) + (answering.passed,)
        place, hidden = Place(passed, stacks[0].first, answering.kept), answering.hidden
        if not self._holds_with(place, hidden):
            return None
        place = self._with_rows(self._with_fewer(place, hidden), hidden)
        place = self._with_tokens(place, hidden, lengths)
        parts = _parts(place, hidden)
        with counted() as cost:
            self._tried(place, parts)
        return Found(place, parts, skip_macs=cost.so_far)

    def _with_fewer(self, place: Place, hidden: Hidden) -> Place:
        """Streams that the answer does not need are handed on and not kept: a double block's text, position tables."""
        for entry in place.kept:
            fewer = replace(place, kept=tuple(kept for kept in place.kept if kept is not entry))
            if fewer.kept and self._holds_with(fewer, hidden):
                place = fewer
        return place

    def _with_rows(self, place: Place, hidden: Hidden) -> Place:
        """Where each cond's part of the kept tensors lies: proved by changing the first one's and looking whose answer changes."""
        for axes in islice(product(*(_rows_axes(kept.shape, self.rows, self._conds) for kept in place.kept)), _MOST_AXES):
            there = replace(place, kept=tuple(replace(kept, rows=axis) for kept, axis in zip(place.kept, axes)))
            if self._conds == 1:
                return there
            parts = [list(part.chunk(self._conds)) for part in _parts(there, hidden)]
            if self._is_one_alone(self._tried(there, [torch.cat((part[0].roll(1, -1), *part[1:])) for part in parts]), parts[0][0].dtype):
                return there
        return replace(place, kept=tuple(replace(kept, rows=None) for kept in place.kept), is_joint=self._conds > 1)

    def _is_one_alone(self, answer: Any, dtype: torch.dtype) -> bool:
        """Whether the part of exactly one cond differs from the answer proper; some networks swap theirs."""
        ours, theirs = ([tensor.chunk(self._conds) for _, tensor in tensors(each)] for each in (self._answer, answer))
        changed = {i for a, b in zip(ours, theirs) for i, pair in enumerate(zip(a, b)) if not _is_close(*pair, dtype)}
        return answer is not None and len(changed) == 1

    def _with_tokens(self, place: Place, hidden: Hidden, lengths: list[int]) -> Place:
        """Of joint text and image tokens, those that the answer needs."""
        for kept in place.kept:
            if len(kept.shape) != 3 or kept.rows != 0 or kept.like is None:
                continue

            def holds(start: int, stop: int, own: Kept = kept) -> bool:
                return self._holds_with(_with_cut(place, own, start, stop), hidden)

            start, stop = needed(kept.shape[1], lengths, holds)
            if (start, stop) != (0, kept.shape[1]):
                place = _with_cut(place, kept, start, stop)
        return place

    # -- running it -------------------------------------------------------------------------------------

    def _holds_with(self, place: Place, hidden: Hidden) -> bool:
        return self.holds(place, _parts(place, hidden))

    def _tried(self, place: Place, hidden: Sequence[Tensor]) -> Any:
        """The answer, None where the network does not run so."""
        try:
            with own_random_numbers(), uncompiled():
                return self.skipped(place, hidden)
        except torch.OutOfMemoryError:
            raise
        except FAILURES:
            return None

    def _is_same(self, answer: Any, hidden: Sequence[Tensor]) -> bool:
        return answer is not None and is_equal(self._answer, answer, hidden[0].dtype if hidden else torch.float32)

    def _whole(self, watched: Watched, reason: str) -> Found:
        found = list(tensors(watched.output))
        axes = [next(_rows_axes(tensor.shape, self.rows, self._conds), None) for _, tensor in found]
        if None in axes:
            axes = [None] * len(axes)
        kept = tuple(Kept(path, None, tensor.shape, tensor.dtype, axis) for (path, tensor), axis in zip(found, axes))
        template = mapped(watched.output, lambda _path, leaf: None if isinstance(leaf, Tensor) else leaf)
        place = Place((Passed("", (template,)),), Site("", 0), kept, reason, is_joint=None in axes)
        return Found(place, _parts(place, dict(found)), reason)


def _choices(stacks: list[Stack]) -> Iterator[list[Stack]]:
    """All stacks, then all but a few, the smallest left out first; of many only the largest."""
    largest_first = sorted(stacks, key=lambda stack: -stack.macs)[:6]
    yield stacks
    for left_out in range(1, len(largest_first)):
        yield from sorted((list(some) for some in combinations(largest_first, len(largest_first) - left_out)),
                          key=lambda some: -sum(stack.macs for stack in some))  # fmt: skip


def _answering(stacks: Sequence[Stack], macs: float) -> Stack:
    """The last stack, unless it keeps more than an earlier one for little: a pixel head's small blocks."""
    best, *earlier = sorted(stacks, key=lambda stack: -stack.ends)
    for stack in earlier:
        if stack.bytes < best.bytes and best.ends - stack.ends <= _WORTH * macs:
            best = stack
    return best


def _parts(place: Place, hidden: Hidden) -> list[Tensor]:
    return [kept.of(hidden[kept.out]) for kept in place.kept]


def _with_cut(place: Place, own: Kept, start: int, stop: int) -> Place:
    cut = replace(own, tokens=slice(start, stop))
    return replace(place, kept=tuple(cut if kept is own else kept for kept in place.kept))


def _rows_axes(shape: torch.Size, rows: int, conds: int) -> Iterator[int]:
    """The axes that may be the batch, the likeliest first: as long as the answer's, then those that the conds divide."""
    yield from (axis for axis, size in enumerate(shape) if size == rows)
    if conds > 1:
        yield from (axis for axis, size in enumerate(shape) if size != rows and size % conds == 0)


def needed(total: int, lengths: Sequence[int], holds: Callable[[int, int], bool]) -> tuple[int, int]:
    """The tokens, of `total`, that have to be kept: those before the first and after the last of them may be handed on as given.

    holds: whether keeping [start, stop) is enough. lengths: of other streams, the likeliest places to cut at.
    """
    cuts = [length for length in lengths if length < total]
    for start, stop in [*((cut, total) for cut in cuts), *((0, total - cut) for cut in cuts)]:
        if holds(start, stop):
            return start, stop
    start = _furthest(total, lambda cut: holds(cut, total))
    return (start, total) if start else (0, total - _furthest(total, lambda cut: holds(0, total - cut)))


def _furthest(total: int, holds: Callable[[int], bool]) -> int:
    """The largest cut 0..total-1 that holds, where every smaller one does."""
    low, high = 0, total
    step = 1
    while low + step < total and holds(low + step):  # most often not even the first
        low, step = low + step, step * 2
    high = min(total, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Numbers drawn inside are not missing outside."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield

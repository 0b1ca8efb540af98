"""Proves a place by skipping: with the hidden state of an evaluation put back, the network must answer as it did in that evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import combinations, islice, product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..overrides import forward_overrides, uncompiled
from ..refusals import UnsupportedCallError, failures_refused
from ..store import Unrecorded
from .flops import counted
from .persistence import sketches
from .place import Kept, Passed, Place, Position
from .stacks import Stack, stack_of
from .state import untouched
from .trees import Path, mapped, tensors
from .watch import Watched

_MOST_LEFT = 0.8  # share of a full evaluation's multiply-adds that a skip may cost; with more, the gain is not worth the loss
_WORTH = 0.2  # share of them that a later stack must save to be worth keeping more bytes than an earlier one
_MOST_AXES = 6  # combinations of batch axes that are tried
_PEAK = 16  # the largest rounding error at most, as a multiple of the root of the mean square
_EXACT = 1e-5  # distance up to which answers count as equal in any dtype
Hidden = dict[Path, Tensor]  # the tensors of the answering block's result, by path


class Found(NamedTuple):
    """What was found out in one full evaluation.

    Args:
        place: The best place, None where nothing of the network may be cached.
        hidden: What the place keeps of this evaluation, each (B, L, C).
        reason: Why nothing, or only the whole output, may be cached.
        skip_macs: Multiply-adds of a skipped evaluation.
        is_lasting: Whether this holds for later calls too.
    """

    place: Place | None
    hidden: Sequence[Tensor] = ()
    reason: str = ""
    skip_macs: float = 0.0
    is_lasting: bool = True


def is_finite(answer: Any) -> bool:
    """Returns whether all numbers of an answer are finite. Waits for the device."""
    return all(bool(torch.isfinite(tensor).all()) for _, tensor in tensors(answer))


def is_equal(one: Any, other: Any, dtype: torch.dtype, slack: float = 1.0) -> bool:
    """Returns whether two answers differ by no more than rounding in `dtype`, relative to their spread. Waits for the device.

    Args:
        slack: Allowed rounding, as a multiple of that between two evaluations of the same operations in the same shapes.
    """
    return _distance(one, other) <= slack * _rounding(one, dtype)


def _rounding(answer: Any, dtype: torch.dtype) -> float:
    kinds = [kind for kind in (dtype, *(tensor.dtype for _, tensor in tensors(answer))) if kind.is_floating_point]
    return max(_EXACT, *(torch.finfo(kind).eps for kind in kinds))


def _distance(one: Any, other: Any) -> float:
    """Returns the distance of two answers relative to their spread: 0 only where they are equal, infinite where they cannot be compared.

    It is the root of the mean square of the differences, or a part of the largest one where that is more: one wrong token among
    thousands is wrong.
    """
    ours, theirs = list(tensors(one)), list(tensors(other))
    if [(path, tensor.shape) for path, tensor in ours] != [(path, tensor.shape) for path, tensor in theirs]:
        return math.inf
    return max((_apart(a, b) for (_, a), (_, b) in zip(ours, theirs)), default=math.inf)


def _apart(a: Tensor, b: Tensor) -> float:
    if torch.equal(a, b):
        return 0.0
    a, b = a.float(), b.float()
    spread = float(a.std()) if a.numel() > 1 else float(a.abs().max())
    differences = (a - b).abs()
    far = max(float(differences.square().mean().sqrt()), float(differences.max()) / _PEAK)
    return far / spread if math.isfinite(far) and spread else math.inf


class Prover:
    """Proves places of one network by repeating one full evaluation with skips.

    Args:
        network: The network.
        compute: Runs it again on the same inputs.
        answer: What it returned in the full evaluation.
        conds: Number of conds in the call.
        unrecorded: See `store.Unrecorded`.
        bookkeeping: See `Places`.

    Attributes:
        rows: Batch rows of the answer, of all conds together.
        sketches: Sketches (see `persistence`) of what the answering block was given in skips, the latest for each kept tensor, by path.
    """

    def __init__(
        self,
        network: nn.Module,
        compute: Callable[[], Any],
        answer: Any,
        conds: int,
        unrecorded: Unrecorded = nullcontext,
        bookkeeping: tuple[str, ...] = (),
    ) -> None:
        self._unrecorded, self._bookkeeping = unrecorded, bookkeeping
        self._is_tried = False
        self._network, self._compute, self._answer, self._conds = network, compute, answer, conds
        self._allowed = math.inf  # distance of answers that is allowed, where rounding would allow more
        self.rows = next(tensor.shape[0] for _, tensor in tensors(answer))
        self.sketches: dict[Path, Tensor] = {}  # of what the answering block was given in a skip, by path in its result
        self._pieces = conds if conds > 1 else self.rows  # number of conds, or of the pictures of a single one

    def skipped(self, place: Place, hidden: Sequence[Tensor]) -> Any:
        """Returns the network's answer with a hidden state put in.

        Args:
            hidden: One tensor (B, L, C) for each that the place keeps.

        Raises:
            UnsupportedCallError: Where the answering block was not reached, as another node answered for the network.
        """
        is_asked = False

        def put_in(given: list[Tensor | None]) -> list[Tensor]:
            nonlocal is_asked
            is_asked = True
            self.sketches |= sketches(place, given)
            return [tensor.clone() for tensor in hidden]

        with forward_overrides(place.skip(self._network, put_in, self._unrecorded)):
            answer = self._compute()
        if not is_asked:
            raise UnsupportedCallError("the answering block was not reached")
        return answer

    def holds(self, place: Place, hidden: Sequence[Tensor]) -> bool:
        """Returns whether the place is proved in this evaluation. The state of the random number generators is restored."""
        return self._is_same(self._tried(place, hidden), hidden)

    def find(self, watched: Watched) -> Found:
        """Returns the best place that is proved, else the network's whole output, or none where that would be wrong."""
        if watched.changed or watched.appeared:  # what only appeared may be a table made once: the next evaluation shows it
            reason = f"it keeps state between calls ({watched.changed or watched.appeared})"
            return Found(None, reason=reason, is_lasting=bool(watched.changed))
        if not is_finite(self._answer):
            return Found(None, reason="its output has NaN or infinite values", is_lasting=False)
        stacks = [stack for entry in watched.lists if (stack := stack_of(entry)) is not None]
        if not stacks:
            return Found(None, reason="it has no list of blocks that each run once, in order")
        lengths = sorted(watched.lengths, reverse=True)
        for chosen in _choices(stacks):
            found = self._found(chosen, watched.macs, lengths)
            if found is not None:
                return found
        again = self._attempt(self._compute)
        if again is None or not is_equal(self._answer, again, torch.float32):
            return Found(None, reason="it returns different outputs for the same input")
        if not self._is_tried:
            return self._whole(watched, "its lists of blocks do less than a fifth of its work")
        return self._whole(watched, "with its hidden state put back, it does not return the same output")

    # -- one choice of stacks ---------------------------------------------------------------------------

    def _found(self, chosen: list[Stack], macs: float, lengths: list[int]) -> Found | None:
        """Returns the place that skips these stacks and keeps only what the answer needs, None where it is not proved or saves little."""
        answering = _answering(chosen, macs)
        stacks = sorted((stack for stack in chosen if stack.ends <= answering.ends), key=lambda stack: stack.starts)
        if macs - sum(stack.macs for stack in stacks) > _MOST_LEFT * macs:
            return None
        passed = (*(stack.passed for stack in stacks if stack is not answering), answering.passed)
        place, hidden = Place(passed, stacks[0].first, answering.kept), answering.hidden
        self._allowed, self._is_tried = math.inf, True
        with counted() as cost:
            first = self._tried(place, _parts(place, hidden))
        if not self._is_same(first, _parts(place, hidden)):
            return None
        self._allowed = max(_EXACT, 4 * _distance(self._answer, first))  # what is left out must not hide in a short dtype's rounding
        place = self._with_rows(self._with_fewer(place, hidden), hidden)
        if not self._is_seen(place, hidden):
            return Found(None, reason="its output does not depend on its blocks", is_lasting=False)
        place = self._with_tokens(place, hidden, lengths)
        return Found(place, _parts(place, hidden), skip_macs=cost.so_far)

    def _with_fewer(self, place: Place, hidden: Hidden) -> Place:
        """Hands on tensors that the answer does not need instead of keeping them, such as a double block's text or position tables."""
        for entry in place.kept:
            fewer = replace(place, kept=tuple(kept for kept in place.kept if kept is not entry))
            if fewer.kept and self._holds_with(fewer, hidden):
                place = fewer
        return place

    def _with_rows(self, place: Place, hidden: Hidden) -> Place:
        """Finds the axis of the batch in the kept tensors.

        It is proved by changing each cond's part, or the first picture's of a single cond: no other answer may change.
        """
        for axes in islice(product(*(_rows_axes(kept.shape, self.rows, self._conds) for kept in place.kept)), _MOST_AXES):
            there = replace(place, kept=tuple(replace(kept, rows=axis) for kept, axis in zip(place.kept, axes)))
            if self._pieces == 1 or (
                all(self._is_one_alone(there, hidden, piece) for piece in range(self._conds)) and self._is_cut_between(there, hidden)
            ):
                return there
        return replace(place, kept=tuple(replace(kept, rows=None) for kept in place.kept), is_joint=self._conds > 1)

    def _is_one_alone(self, place: Place, hidden: Hidden, piece: int) -> bool:
        """Returns whether another hidden state of this cond, or picture, changes its answer and no other."""
        parts = [list(part.chunk(self._pieces)) for part in _parts(place, hidden)]
        altered = [torch.cat((*part[:piece], _other(part[piece]), *part[piece + 1 :])) for part in parts]
        return self._changed(place, altered) == {piece}

    def _changed(self, place: Place, altered: Sequence[Tensor]) -> set[int]:
        """Returns the conds, or pictures, whose answer changes with this hidden state."""
        answer = self._tried(place, altered)
        changed = set[int]()
        for (_, one), (_, other) in zip(tensors(self._answer), tensors(answer)):
            parts = zip(one.chunk(self._pieces), other.chunk(self._pieces))
            changed |= {piece for piece, (ours, theirs) in enumerate(parts) if not self._is_near(ours, theirs, altered)}
        return changed

    def _is_cut_between(self, place: Place, hidden: Hidden) -> bool:
        """Returns whether the kept tensors are cut exactly between conds. This is tried only on axes that are longer than the batch.

        Where conds of different lengths are packed into one stream, half of it may hold one cond's image and some of another's text, which
        `_is_one_alone` does not notice. So the first and the last row of every part are changed, and must change its cond's answer.
        """
        if all(kept.rows is not None and kept.shape[kept.rows] == self.rows for kept in place.kept):
            return True
        parts = [part.unflatten(0, (self._pieces, -1)) for part in _parts(place, hidden)]
        for row in (0, -1):
            altered = [part.clone() for part in parts]
            for part in altered:
                part[:, row] = _other(part[:, row])
            if len(self._changed(place, [part.flatten(0, 1) for part in altered])) < self._pieces:
                return False
        return True

    def _is_seen(self, place: Place, hidden: Hidden) -> bool:
        """Returns whether the answer depends on what is kept. If not, an equal answer proves nothing: a final layer may start at zero."""
        if self._pieces > 1 and not any(kept.rows is None for kept in place.kept):
            return True  # shown when the batch axis was found
        parts = _parts(place, hidden)
        answer = self._tried(place, [_other(part) for part in parts])
        return answer is not None and not self._is_near(self._answer, answer, parts)

    def _with_tokens(self, place: Place, hidden: Hidden, lengths: list[int]) -> Place:
        """Keeps only those of joint text and image tokens that the answer depends on.

        The others are replaced by wrong ones for the test. It would not be enough to hand them on as given, as blocks may leave some
        tokens unchanged in one evaluation and not in the next.
        """
        whole = place
        for number, kept in enumerate(whole.kept):
            if len(kept.shape) != 3 or kept.rows != 0 or kept.like is None:
                continue

            def holds(start: int, stop: int, number: int = number) -> bool:
                parts = [part.clone() for part in _parts(whole, hidden)]
                for unseen in (parts[number][:, :start], parts[number][:, stop:]):
                    unseen.copy_(_other(unseen))
                return self._is_same(self._tried(whole, parts), parts)

            start, stop = needed(kept.shape[1], lengths, holds)
            if (start, stop) != (0, kept.shape[1]):
                place = _with_cut(place, kept, start, stop)
        return place

    # -- running it -------------------------------------------------------------------------------------

    def _holds_with(self, place: Place, hidden: Hidden) -> bool:
        return self.holds(place, _parts(place, hidden))

    def _tried(self, place: Place, hidden: Sequence[Tensor]) -> Any:
        """Returns the network's answer with this hidden state put in, None where it fails."""
        return self._attempt(lambda: self.skipped(place, hidden))

    def _attempt(self, run: Callable[[], Any]) -> Any:
        """Returns the result of `run`, None where the network fails in it. Restores the network and the random numbers."""
        try:
            with own_random_numbers(), untouched(self._network, self._bookkeeping), uncompiled(), failures_refused():
                return run()
        except UnsupportedCallError:
            return None

    def _is_same(self, answer: Any, hidden: Sequence[Tensor]) -> bool:
        return answer is not None and self._is_near(self._answer, answer, hidden)

    def _is_near(self, one: Any, other: Any, hidden: Sequence[Tensor]) -> bool:
        return _distance(one, other) <= min(self._allowed, _rounding(one, hidden[0].dtype if hidden else torch.float32))

    def _whole(self, watched: Watched, reason: str) -> Found:
        found = list(tensors(watched.output))
        axes = [next(_rows_axes(tensor.shape, self.rows, self._conds), None) for _, tensor in found]
        if None in axes:
            axes = [None] * len(axes)
        kept = tuple(Kept(path, None, tensor.shape, tensor.dtype, axis) for (path, tensor), axis in zip(found, axes))
        template = mapped(watched.output, lambda _path, leaf: None if isinstance(leaf, Tensor) else leaf)
        place = Place((Passed("", (template,)),), Position("", 0), kept, reason, is_joint=None in axes)
        return Found(place, _parts(place, dict(found)), reason)


def _choices(stacks: list[Stack]) -> Iterator[list[Stack]]:
    """Yields all stacks, then fewer and fewer of the six largest ones, and of equally many the largest first."""
    largest_first = sorted(stacks, key=lambda stack: -stack.macs)[:6]
    yield stacks
    for left_out in range(1, len(largest_first)):
        yield from sorted((list(some) for some in combinations(largest_first, len(largest_first) - left_out)),
                          key=lambda some: -sum(stack.macs for stack in some))  # fmt: skip


def _answering(stacks: Sequence[Stack], macs: float) -> Stack:
    """Returns the last stack, or an earlier one that keeps fewer bytes while little more is computed.

    The last one may be a pixel head's small blocks.
    """
    best, *earlier = sorted(stacks, key=lambda stack: -stack.ends)
    for stack in earlier:
        if stack.bytes < best.bytes and best.ends - stack.ends <= _WORTH * macs:
            best = stack
    return best


def _other(part: Tensor) -> Tensor:
    """Returns a wrong hidden state of the same shape."""
    return part.roll(1, -1) if part.shape[-1] > 1 else -part


def _parts(place: Place, hidden: Hidden) -> list[Tensor]:
    return [kept.of(hidden[kept.out]) for kept in place.kept]


def _with_cut(place: Place, own: Kept, start: int, stop: int) -> Place:
    cut = replace(own, tokens=slice(start, stop))
    return replace(place, kept=tuple(cut if kept is own else kept for kept in place.kept))


def _rows_axes(shape: torch.Size, rows: int, conds: int) -> Iterator[int]:
    """Yields the axes that may be the batch: first those as long as the answer's, then those whose size the number of conds divides."""
    yield from (axis for axis, size in enumerate(shape) if size == rows)
    if conds > 1:
        yield from (axis for axis, size in enumerate(shape) if size != rows and size % conds == 0)


def needed(total: int, lengths: Sequence[int], holds: Callable[[int, int], bool]) -> tuple[int, int]:
    """Returns the range of tokens that must be kept, as start and stop. Those before and after it may have any values.

    Both ends may be cut: text before the image, references or padding after it.

    Args:
        total: Number of tokens.
        lengths: Numbers of tokens in other streams, which are the likeliest lengths to cut off.
        holds: Returns whether it is enough to keep the tokens [start, stop).
    """
    start, stop, cuts = 0, total, [length for length in lengths if length < total]
    if total > 1 and holds(1, total):  # most often not even one can be cut
        start = next((cut for cut in cuts if holds(cut, total)), 1)
        start += _furthest(total - start, lambda cut: holds(start + cut, total))
    if stop - start > 1 and holds(start, stop - 1):
        stop = next((total - cut for cut in cuts if total - cut > start and holds(start, total - cut)), stop - 1)
        stop -= _furthest(stop - start, lambda cut: holds(start, stop - cut))
    return start, stop


def _furthest(total: int, holds: Callable[[int], bool]) -> int:
    """Returns the largest cut in 0..total-1 that holds, where all smaller ones do too."""
    low, high = 0, total
    step = 1
    while low + step < total and holds(low + step):  # most often not even the first one holds
        low, step = low + step, step * 2
    high = min(total, low + step)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if holds(middle) else (low, middle)
    return low


@contextmanager
def own_random_numbers() -> Iterator[None]:
    """Restores the random number generators at the end, so that what is drawn inside changes nothing outside."""
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_available() and torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        yield

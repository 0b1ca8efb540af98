"""Selects the watched lists whose blocks can hand on what they are given, and notes what each block would return then."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor

from .place import Kept, LeftOut, Passed, Position
from .trees import Given, Path, leaves, mapped
from .watch import BlockCall, ListCalls, Spec


class Stack(NamedTuple):
    """A list of blocks that were called once each, all or at least half of them.

    Args:
        passed: What its blocks return in a skip.
        kept: The tensors of the last block's result.
        hidden: Copies of these tensors, by path in the result.
        macs: Multiply-adds of all its blocks.
        starts: Multiply-adds of the network before the first block.
        ends: Multiply-adds of the network by the end of the last block.
    """

    passed: Passed
    kept: tuple[Kept, ...]
    hidden: dict[Path, Tensor]
    macs: float
    starts: float
    ends: float

    @property
    def first(self) -> Position:
        return Position(self.passed.path, self.passed.first)

    @property
    def bytes(self) -> int:
        return sum(tensor.nbytes for tensor in self.hidden.values())


def stack_of(watched: ListCalls) -> Stack | None:
    """Returns the stack that a watched list is.

    None where it is none: a block is called twice, most blocks are left out, or the last one can hand on nothing that it is given.
    """
    called = {call.index for call in watched.calls}
    if len(called) < len(watched.calls) or not watched.kept:
        return None
    common = _common(watched.links)
    templates = {call.index: _template(call, common) for call in watched.calls}
    last = watched.calls[-1]
    at_last = dict(leaves(templates[last.index]))
    kept = tuple(
        Kept(out, at_last[out].path if isinstance(at_last[out], Given) else None, tensor.shape, tensor.dtype)
        for out, tensor in watched.kept.items()
    )
    if not any(isinstance(leaf, Given) for leaf in at_last.values()):
        return None
    return Stack(
        Passed(watched.path, tuple(templates.get(i, LeftOut()) for i in range(len(watched.blocks))), watched.calls[0].index, last.index),
        kept,
        watched.kept,
        watched.macs,
        watched.calls[0].starts,
        watched.ends,
    )


def _common(links: list[dict[Path, Path | None]]) -> dict[Path, Path]:
    """Returns, for each path in a block's result, the path in (args, kwargs) at which the next block most often receives it."""
    seen: dict[Path, Counter[Path]] = {}
    for link in links:
        for out, path in link.items():
            if path is not None:
                seen.setdefault(out, Counter())[path] += 1
    return {out: counts.most_common(1)[0][0] for out, counts in seen.items()}


def _template(call: BlockCall, common: dict[Path, Path]) -> Any:
    """Returns the template of a call: what the block would return if it handed on what it was given.

    A tensor that is created anew between blocks is recognised by its shape. None stands for a tensor of a shape that was not given, and
    for a number, which may differ next time: the proof shows whether the network can do without them.
    """
    used = {path for out, path in common.items() if call.given.get(path) == _spec_at(call.gave, out)}

    def leaf_of(out: Path, leaf: Any) -> Any:
        if not isinstance(leaf, Spec):
            return leaf if isinstance(leaf, (bool, str)) else None
        for path in (common.get(out), call.same.get(out)):
            if path is not None and call.given.get(path) == leaf:
                return Given(path)
        for is_alike in (lambda spec: spec == leaf, lambda spec: spec.shape == leaf.shape):
            path = next((p for p, spec in call.given.items() if is_alike(spec) and p not in used), None)
            if path is not None:
                used.add(path)
                return Given(path)
        return None

    return mapped(call.gave, leaf_of)


def _spec_at(gave: Any, out: Path) -> Any:
    return dict(leaves(gave)).get(out)

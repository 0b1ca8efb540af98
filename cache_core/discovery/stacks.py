"""Which of the watched lists can be passed through, and what each of their blocks would return then."""

from __future__ import annotations

from collections import Counter
from typing import Any, NamedTuple

from torch import Tensor

from .place import Kept, LeftOut, Passed, Position
from .trees import Given, Path, leaves, mapped
from .watch import BlockCall, ListCalls, Spec


class Stack(NamedTuple):
    """A list whose blocks were called once each, or most of them. macs: of all of them; starts, ends: of the model until the first and
    after the last.

    hidden: copies of the tensors that the last block gave.
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
    """None where the list is no stack: blocks are called twice, most are left out, or they hand on nothing of what they were given."""
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
    """Where the next block most often gets what a block gave."""
    seen: dict[Path, Counter[Path]] = {}
    for link in links:
        for out, path in link.items():
            if path is not None:
                seen.setdefault(out, Counter())[path] += 1
    return {out: counts.most_common(1)[0][0] for out, counts in seen.items()}


def _template(call: BlockCall, common: dict[Path, Path]) -> Any:
    """What the block would return if it handed on what it was given. A tensor that was made anew between blocks is told by its shape.

    None stands for a tensor like none that was given and for a number, which might be another one next time: the proof shows whether the
    network does without.
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

"""One full evaluation, watched: which lists of blocks run, what their blocks are given and give, and what that costs."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import blocks_of
from ..overrides import Forward, Override, forward_overrides, uncompiled
from ..store import Unrecorded
from .flops import Macs, counted
from .state import Facts, changed, fact_of, facts_given, facts_of
from .trees import Path, mapped, tensors

_LEAST = 0.03  # of a model's multiply-adds, before a list of blocks is worth a copy of what it gives


@dataclass(frozen=True)
class Spec:
    """What a tensor looks like."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass
class BlockCall:
    """One call of a block. given: its tensors by their path in (args, kwargs), their number ones too. gave: its result, with a `Spec`
    for every tensor. same: paths of tensors that it gave -> where it was given the very same one. starts, ends: multiply-adds so far.
    """

    index: int
    given: dict[Path, Any]
    gave: Any = None
    same: dict[Path, Path] = field(default_factory=dict)
    starts: float = 0.0
    ends: float = 0.0


@dataclass
class ListCalls:
    """The calls of a list's blocks. links: for every call but the first, the path in (args, kwargs) of each tensor that the call before
    gave, as the same object. kept: copies of what the last block gave, empty where less than half of them were called.
    """

    path: str
    blocks: list[nn.Module]
    calls: list[BlockCall] = field(default_factory=list)
    links: list[dict[Path, Path | None]] = field(default_factory=list)
    kept: dict[Path, Tensor] = field(default_factory=dict)
    _before: Any = None  # what the block before gave, until the next one is called

    @property
    def macs(self) -> float:
        return sum(call.ends - call.starts for call in self.calls)

    @property
    def ends(self) -> float:
        """Multiply-adds by the time the last block is left."""
        return self.calls[-1].ends


@dataclass
class Watched:
    """What one full evaluation showed. output: a copy of what the network returned, None where it was not called or ran nothing.

    lengths: numbers of tokens that blocks of any list were given. inputs: what every watched layer was given, call by call, by its key.
    changed: what the call left changed in the network, or in what that was given, by name; "" for nothing. appeared: what it left there
    anew: a table made at the first call, or a cache of keys and values. plain: ids of tensors that the network was given by themselves.
    """

    lists: list[ListCalls]
    lengths: set[int] = field(default_factory=set)
    macs: float = 0.0
    output: Any = None
    inputs: dict[Any, list[Spec]] = field(default_factory=dict)
    changed: str = ""
    appeared: str = ""
    plain: set[int] = field(default_factory=set)

    def compare(self, before: Facts, after: Facts, strict: Collection[str] = ("",)) -> None:
        """Notes what changed in a call. strict: see `changed`."""
        other, new = changed(before, after, strict)
        self.changed, self.appeared = self.changed or other, self.appeared or new


def lists_of(network: nn.Module) -> dict[str, list[nn.Module]]:
    """The outermost lists of blocks, by their dotted path. A sequence counts where its modules are of one class."""
    found: dict[str, list[nn.Module]] = {}
    for name, module in network.named_modules():
        if not name or any(name.startswith(f"{other}.") for other in found):
            continue
        is_list = isinstance(module, (nn.ModuleList, nn.ModuleDict))
        if not is_list and not (isinstance(module, nn.Sequential) and len(module) > 1 and len({type(block) for block in module}) == 1):
            continue
        blocks = blocks_of(module)
        if blocks and not all(isinstance(block, (nn.ModuleList, nn.ModuleDict)) for block in blocks):
            found[name] = blocks
    return found


@contextmanager
def watching(
    network: nn.Module, layers: Mapping[Any, nn.Module], unrecorded: Unrecorded, bookkeeping: tuple[str, ...] = ()
) -> Iterator[Watched]:
    """Around one full evaluation. layers: whose inputs are to be noted, by any key. bookkeeping: see `Places`.

    The result is complete when the context ends.
    """
    lists = [ListCalls(path, blocks) for path, blocks in lists_of(network).items()]
    watched = Watched(lists)
    before = facts_of(network, bookkeeping)
    with counted() as macs, uncompiled():
        overrides: list[Override] = []
        for entry in lists:
            overrides += [(block, _noting(watched, entry, index, macs, unrecorded)) for index, block in enumerate(entry.blocks)]
        overrides += [(layer, _noting_input(watched.inputs, key)) for key, layer in layers.items()]
        overrides.append((network, _noting_output(watched, unrecorded)))
        with forward_overrides(overrides):
            yield watched
        watched.macs = macs.so_far
    if not watched.macs:
        watched.output = None
    for entry in lists:
        entry._before = None
    watched.compare(before, facts_of(network, bookkeeping), [f"{entry.path}." for entry in lists])
    given = (spec for entry in lists for call in entry.calls for spec in call.given.values())
    watched.lengths = {spec.shape[1] for spec in given if len(spec.shape) == 3 and spec.shape[1] > 1}
    watched.lists = [entry for entry in lists if entry.calls and entry.macs >= _LEAST * watched.macs]


def _noting(watched: Watched, entry: ListCalls, index: int, macs: Macs, unrecorded: Unrecorded) -> Callable[[Forward], Forward]:
    def make(forward: Forward) -> Forward:
        def noted(*args: Any, **kwargs: Any) -> Any:
            given = [(path, tensor) for path, tensor in tensors((args, kwargs))]
            if entry._before is not None:
                entry.links.append({out: _path_of(tensor, given) for out, tensor in tensors(entry._before)})
                entry._before = None
            call = BlockCall(index, {path: _spec(tensor) for path, tensor in given}, starts=macs.so_far)
            entry.calls.append(call)
            plain = {f"{entry.path} writes at {path[1]}": tensor for path, tensor in given if id(tensor) in watched.plain}
            before = {name: fact_of(tensor) for name, tensor in plain.items()}
            result = forward(*args, **kwargs)
            watched.compare(before, {name: fact_of(tensor) for name, tensor in plain.items()})
            call.ends = macs.so_far
            call.gave = mapped(result, lambda _path, leaf: _spec(leaf) if isinstance(leaf, Tensor) else leaf)
            call.same = {out: path for out, tensor in tensors(result) if (path := _path_of(tensor, given)) is not None}
            if 2 * len(entry.calls) >= len(entry.blocks) and entry.macs >= _LEAST * macs.so_far:
                with unrecorded():
                    _copy(entry.kept, result)
            if len(entry.calls) < len(entry.blocks):
                entry._before = result
            return result

        return noted

    return make


def _copy(kept: dict[Path, Tensor], result: Any) -> None:
    """Copies of a result's tensors, as the host may write into them, in place of those of the block before: which block is the last one is
    known only when no other follows, as guidance leaves layers out."""
    found = dict(tensors(result))
    for path in kept.keys() - found.keys():
        del kept[path]
    for path, tensor in found.items():
        if path in kept and _spec(kept[path]) == _spec(tensor) and kept[path].device == tensor.device:
            kept[path].copy_(tensor)
        else:
            kept[path] = tensor.clone()


def _noting_output(watched: Watched, unrecorded: Unrecorded) -> Callable[[Forward], Forward]:
    def make(forward: Forward) -> Forward:
        def noted(*args: Any, **kwargs: Any) -> Any:
            before = facts_given(args, kwargs)
            watched.plain = {id(value) for value in (*args, *kwargs.values()) if isinstance(value, Tensor)}
            result = forward(*args, **kwargs)
            watched.compare(before, facts_given(args, kwargs))
            with unrecorded():
                watched.output = mapped(result, lambda _path, leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf)
            return result

        return noted

    return make


def _noting_input(inputs: dict[Any, list[Spec]], key: Any) -> Callable[[Forward], Forward]:
    def make(forward: Forward) -> Forward:
        def noted(*args: Any, **kwargs: Any) -> Any:
            if args and isinstance(args[0], Tensor):
                inputs.setdefault(key, []).append(_spec(args[0]))
            return forward(*args, **kwargs)

        return noted

    return make


def _spec(tensor: Tensor) -> Spec:
    return Spec(tensor.shape, tensor.dtype)


def _path_of(tensor: Tensor, given: list[tuple[Path, Tensor]]) -> Path | None:
    return next((path for path, other in given if other is tensor), None)

"""Watches one full evaluation: which lists of blocks run, what their blocks are given and return, and what that costs."""

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

_LEAST = 0.03  # share of a network's multiply-adds from which on a list of blocks is worth a copy of its result


@dataclass(frozen=True)
class Spec:
    """The shape and dtype of a tensor."""

    shape: torch.Size
    dtype: torch.dtype


@dataclass
class BlockCall:
    """One call of a block.

    Args:
        index: Index of the block in its list.
        given: A `Spec` of every tensor that it was given, by path in (args, kwargs).
        gave: Its result, with a `Spec` in place of every tensor.
        same: For tensors that it returned as they were given, from the path in the result to that in (args, kwargs).
        starts: Multiply-adds of the network before the call.
        ends: Multiply-adds of the network after it.
    """

    index: int
    given: dict[Path, Any]
    gave: Any = None
    same: dict[Path, Path] = field(default_factory=dict)
    starts: float = 0.0
    ends: float = 0.0


@dataclass
class ListCalls:
    """The calls of the blocks of one list.

    Args:
        path: Dotted path of the list on the network.
        blocks: Its blocks, in order.
        calls: Their calls, in order.
        links: For every call but the first, where it received each tensor of the result before: from the path in that result to the
            path in (args, kwargs) of the same object, None where it is not there.
        kept: Copies of the tensors of the last block's result, by path. Empty where few blocks were called or do little.
    """

    path: str
    blocks: list[nn.Module]
    calls: list[BlockCall] = field(default_factory=list)
    links: list[dict[Path, Path | None]] = field(default_factory=list)
    kept: dict[Path, Tensor] = field(default_factory=dict)
    _before: Any = None  # the result of the last call, until the next block is called

    @property
    def macs(self) -> float:
        return sum(call.ends - call.starts for call in self.calls)

    @property
    def ends(self) -> float:
        """Multiply-adds of the network by the end of the last block."""
        return self.calls[-1].ends


@dataclass
class Watched:
    """What one full evaluation showed.

    Args:
        lists: The lists of blocks that ran and did enough of the work, with their calls.
        lengths: Numbers of tokens that blocks of any list were given.
        macs: Multiply-adds of the network.
        output: A copy of what the network returned, None where it was not called or ran nothing.
        inputs: A `Spec` of what every watched layer was given, in order of its calls, by its key.
        changed: The name of what the call changed in the network or in its arguments, "" for nothing.
        appeared: The name of what it added there, such as a table made at the first call or a cache of keys and values.
        plain: Ids of the tensors that the network was given directly as arguments.
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
        """Notes what changed in a call. See `state.changed`."""
        other, new = changed(before, after, strict)
        self.changed, self.appeared = self.changed or other, self.appeared or new


def lists_of(network: nn.Module) -> dict[str, list[nn.Module]]:
    """Returns the outermost lists of blocks by dotted path. An `nn.Sequential` counts where its modules are of one class."""
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
    """Watches the full evaluation that is made inside the context. What it yields is complete when the context ends.

    Args:
        network: The network.
        layers: The layers whose inputs are noted, by any key.
        unrecorded: Context around what is allocated in blocks (see `store.Unrecorded`).
        bookkeeping: See `Places`.
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
    """Replaces the copies of the result before by copies of this one, as the host may write into its tensors.

    Every block may be the last one, as guidance leaves blocks out: that is known only when no other follows.
    """
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

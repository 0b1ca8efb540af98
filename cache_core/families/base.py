"""How a model family is described: where its blocks, token streams and sublayers are."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..kinds import Kind
from ..refusals import UnknownInputError, UnsupportedCallError
from .as_read import has
from .linears import StackLinears

Lengths = Mapping[str, int]  # tokens of every stream, e.g. {"img": 4096, "txt": 512}


@dataclass(frozen=True)
class Site:
    """One sublayer whose result a full evaluation keeps, before its gate.

    name: key of the feature. module: dotted path inside the block of a submodule that the host calls.
    tokens: the stream it belongs to. source: which side of that call to keep, "input" or "output".
    width: only the first `width(block)` channels are kept; None keeps all, which are the family's `channels`.
    every: the module runs in one of so many full evaluations, others are answered with what is kept of it (see `EngineCall.rests`).
    macs: multiply-adds of its call for one batch row, by (block, lengths): saved when it does not run.
    """

    name: str
    module: str
    tokens: str
    source: str = "output"
    width: Callable[[nn.Module], int] | None = None
    every: int = 1
    macs: Callable[[nn.Module, Lengths], float] = lambda _block, _lengths: 0.0


class Cached(Protocol):
    """The kept features of one block as its replay sees them: whole batch, the call's dtype and device."""

    def whole(self, site: str) -> Tensor: ...

    def chosen(self, site: str, tokens: Tensor) -> Tensor: ...

    def refreshed(self, site: str, tokens: Tensor, fresh: Tensor) -> Tensor: ...

    def choose(self, stream: str, length: int) -> Tensor | None: ...


Replay = Callable[[nn.Module, Mapping[str, Any], Cached], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Stack:
    """A list of like blocks.

    path: dotted path of the ModuleList or ModuleDict on the model; "" is the model itself as the only block (`whole_output.py`).
    parameters: names of the block's positional parameters, in order.
    streams: parameter that carries tokens -> stream name. "txt+img" is the two concatenated in that order.
        The block returns them in this order too, or in that of `returns`; a bare tensor where there is one.
    contexts: parameter that carries tokens which blocks only look at (cross-attention) -> their name, to count them.
    returns: parameters of `streams` in the order in which the block returns them, where it is another.
    counts: corrects or completes the token counts from the call's other arguments, where a tensor's shape does not tell them.
    batch: axis of the batch in the streams, whose tokens may lie in a grid: (B, …, C) but for one family.
    channel: axis of the channels once the batch is the first.
    beside: how many values a block returns behind its streams; None takes their places while it is skipped.
    why_not: why a call with these arguments must not be skipped or replayed, "" if it may.
    sites: sublayers a full evaluation keeps for conservative ones, of each block those that it has.
    replay: a block's conservative evaluation, from its own submodules and the kept features.
    """

    path: str
    parameters: tuple[str, ...]
    streams: Mapping[str, str]
    sites: tuple[Site, ...] = ()
    replay: Replay | None = None
    contexts: Mapping[str, str] = field(default_factory=dict)
    returns: tuple[str, ...] = ()
    counts: Callable[[Mapping[str, Any], Lengths], Lengths] = lambda _call, _lengths: {}
    batch: int = 0
    channel: int = -1
    beside: int = 0
    why_not: Callable[[Mapping[str, Any]], str] = lambda _call: ""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        if not self.path:
            return [model]
        found = attrgetter(self.path)(model)
        return list(found.values() if isinstance(found, nn.ModuleDict) else found)

    def sites_of(self, block: nn.Module) -> list[Site]:
        """Not every block of a list has every sublayer. Asked by attributes: the names of a compiled block's modules are others."""
        return [site for site in self.sites if has(block, site.module)]

    def named(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A block call's arguments by name."""
        return {**dict(zip(self.parameters, args)), **kwargs}

    def checked(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A block call's arguments by name. Raises UnsupportedCallError where it must not be skipped or replayed."""
        named = self.named(args, kwargs)
        reason = self.why_not(named)
        if reason:
            raise UnsupportedCallError(reason)
        return named

    def inputs(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The token streams of a block call, in order."""
        named = self.named(args, kwargs)
        return tuple(named[parameter] for parameter in self.streams)

    def lengths(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, int]:
        """Token counts of streams and contexts of a block call, 0 for a context that it does without."""
        named = self.named(args, kwargs)
        lengths = {
            stream: self.flat(named[parameter]).shape[1] for parameter, stream in self.streams.items() if named[parameter] is not None
        }
        contexts = {stream: named.get(parameter) for parameter, stream in self.contexts.items()}
        lengths |= {stream: 0 if tensor is None else tensor[0, ..., 0].numel() for stream, tensor in contexts.items()}
        return {**lengths, **self.counts(named, lengths)}

    def flat(self, tensor: Tensor) -> Tensor:
        """The tokens of a stream as (B, L, C), a view where that is possible."""
        return self._ordered(tensor).flatten(1, -2)

    def grid(self, tokens: Tensor, like: Tensor) -> Tensor:
        """Tokens (B, L, C) in the grid that the stream `like` has; of other channels where a block changes their number."""
        shape = (*self._ordered(like).shape[:-1], tokens.shape[-1])
        return tokens.reshape(shape).movedim(-1, self.channel).movedim(0, self.batch)

    def _ordered(self, tensor: Tensor) -> Tensor:
        """A view (B, …, C)."""
        return tensor.movedim(self.batch, 0).movedim(self.channel, -1)

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The streams, in order, in the form the block returns them in."""
        if len(tensors) == 1 and not self.beside:
            return tensors[0]
        named = dict(zip(self.streams, tensors))
        return (*(named[parameter] for parameter in self.returns or self.streams), *[None] * self.beside)

    def returned(self, result: Any) -> tuple[Tensor, ...]:
        """What a block returned, in the order of `streams`."""
        if not isinstance(result, tuple):
            return (result,)
        named = dict(zip(self.returns or self.streams, result))
        return tuple(named[parameter] for parameter in self.streams)


@dataclass(frozen=True)
class ModelFamily:
    """Everything the engine knows of a family.

    name: as in ComfyUI's model folder. matches: structural test on the diffusion model.
    stacks: in the order the model runs them. hidden: the stream whose last state the final layer reads.
    channels: width of a token in the blocks, which is that of every kept feature but of sites with a width.
    embed: dotted path of the module whose input is the hidden stream's tokens as they enter the model, "" if there is none such;
        tokens: that input as (B, L, d), given the module; input_channels: d.
    macs: multiply-adds of one batch row by (model, lengths, kind, token share), kind not calibrated; outside(...) those of
        embedding and head, which every evaluation costs.
    linears: the linear layers of every stack's blocks, for calibrated evaluations; empty where the family has none. May also describe
        lists of modules beside the stacks.
    measures: path of a module that runs before the blocks -> the stream whose tokens are its first argument (B, L, ...), for streams that
        the first stack gets only concatenated. Of a concatenation one part need not be measured: it is the rest.
    idle: modules beside the blocks that only feed them, each with what answers for it while the blocks are skipped.
    takes_turns: the model runs one block of each stack in turn, not one stack after the other; they are of equal length.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    stacks: tuple[Stack, ...]
    hidden: str
    channels: Callable[[nn.Module], int]
    embed: str
    input_channels: Callable[[nn.Module], int]
    macs: Callable[[nn.Module, Lengths, Kind, float], float]
    outside_macs: Callable[[nn.Module, Lengths], float]
    linears: tuple[StackLinears, ...] = ()
    measures: Mapping[str, str] = field(default_factory=dict)
    tokens: Callable[[nn.Module, Tensor], Tensor] = lambda _module, given: given
    idle: Callable[[nn.Module], Sequence[tuple[nn.Module, Callable[..., Any]]]] = lambda _model: ()
    takes_turns: bool = False

    def placed(self, model: nn.Module) -> list[tuple[Stack, int, nn.Module]]:
        """Every block in running order with its stack and its index there."""
        runs = [[(stack, i, block) for i, block in enumerate(stack.blocks(model))] for stack in self.stacks]
        return [place for run in (zip(*runs, strict=True) if self.takes_turns else runs) for place in run]

    @property
    def is_whole(self) -> bool:
        """Whether nothing but the model's output is kept: the last resort, which the user is told of."""
        return not all(stack.path for stack in self.stacks)

    @property
    def is_conservative(self) -> bool:
        """Whether every block of the family has a conservative form."""
        return all(stack.replay is not None for stack in self.stacks)

    def sublayers(self, model: nn.Module, lengths: Lengths) -> list[tuple[int, int]]:
        """Tokens and channels of all that is kept per batch row for conservative evaluations."""
        sites = [(site, block) for stack, _, block in self.placed(model) for site in stack.sites_of(block)]
        widths = [self.channels(model) if site.width is None else site.width(block) for site, block in sites]
        return [(stream_length(site.tokens, lengths), width) for (site, _), width in zip(sites, widths)]


def stream_length(stream: str, lengths: Lengths) -> int:
    """Tokens of a stream or of a concatenation such as "txt+img"."""
    return sum(lengths[part] for part in stream.split("+"))


def split_lengths(lengths: Lengths, measured: Lengths) -> dict[str, int]:
    """Token counts with those of concatenated streams ("txt+img") divided: what is measured, and one part that is the rest.

    Empty where that does not tell.
    """
    all_known = {**measured, **lengths}
    divided: dict[str, int] = {}
    for stream, total in lengths.items():
        parts = stream.split("+")
        known = {part: all_known[part] for part in parts if part in all_known}
        unknown = [part for part in parts if part not in known]
        rest = total - sum(known.values())
        if len(unknown) > 1 or rest < 0:
            return {}
        divided |= known | dict.fromkeys(unknown, rest)
    return divided


def stream_slice(wanted: str, stream: str, lengths: Lengths) -> slice:
    """Where the tokens of `wanted` lie inside a stream that may be a concatenation."""
    start = 0
    for part in stream.split("+"):
        if part == wanted:
            return slice(start, start + lengths[part])
        start += lengths[part]
    raise KeyError(f"no {wanted} tokens in a {stream} stream")


def linear_weights(*modules: nn.Module | None) -> int:
    """Weights (multiply-adds per token) of all linear layers below the modules, by declared sizes, not tensors."""
    total = 0
    for layer in (layer for module in modules if module is not None for layer in module.modules()):
        if hasattr(layer, "in_features") and hasattr(layer, "out_features"):
            total += int(layer.in_features) * int(layer.out_features)  # type: ignore[arg-type]
    return total


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift, rounded as the host's `addcmul` form is. x (B, L, C); shift, scale (B, 1, C)."""
    return torch.addcmul(shift, x, 1 + scale)

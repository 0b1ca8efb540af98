"""What a family says of a model beside what is found out: its name, conservative replays, fused layers, where its input enters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from ..blocks import blocks_at
from ..refusals import UnknownInputError, UnsupportedCallError
from .as_read import has
from .fused import LinearPart

Fused = Mapping[str, Mapping[str, Callable[[Any], tuple[LinearPart, ...]]]]


@dataclass(frozen=True)
class Site:
    """One sublayer whose result a full evaluation keeps, before its gate.

    name: of the sublayer: attn, self_attn, cross_attn, mlp, output or the like. module: dotted path inside the block of a submodule
    that the host calls. stream: whose tokens it gets. source: which side of that call to keep, "input" or "output".
    width: only the first `width(block)` channels are kept; None keeps all.
    every: the module runs in one of so many full evaluations, others are answered with what is kept of it (see `EngineCall.rests`).
    """

    name: str
    module: str
    stream: str
    source: str = "output"
    width: Callable[[nn.Module], int] | None = None
    every: int = 1

    @property
    def key(self) -> str:
        """Of what is kept of it in a block: "<stream>.<name>"."""
        return f"{self.stream}.{self.name}"


class Cached(Protocol):
    """The kept features of one block as its replay sees them: whole batch, the call's dtype and device. key: of a `Site`."""

    def all_tokens(self, key: str) -> Tensor:
        """Of all tokens (B, L, C)."""
        ...

    def some_tokens(self, key: str, tokens: Tensor) -> Tensor:
        """Of the tokens with these indices (B, k, C)."""
        ...

    def refreshed(self, key: str, tokens: Tensor, fresh: Tensor) -> Tensor:
        """Of all tokens (B, L, C), once `fresh` (B, k, C) was written over those with these indices, for good."""
        ...

    def choose(self, stream: str, length: int) -> Tensor | None:
        """Indices of the tokens to recompute, of `length`; None for none."""
        ...


Replay = Callable[[nn.Module, Mapping[str, Any], Cached], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Stack:
    """A list of like blocks that can be replayed, or whose first one the model's input enters.

    path: dotted path of the ModuleList or ModuleDict on the model.
    parameters: names of the block's positional parameters, in order.
    streams: parameter that carries tokens -> stream name. "txt+img" is the two concatenated in that order.
        The block returns them in this order too, or in that of `returns`; a bare tensor where there is one.
    returns: parameters of `streams` in the order in which the block returns them, where it is another.
    batch: axis of the batch in the streams, whose tokens may lie in a grid: (B, …, C) but for one family.
    why_not: why a call with these arguments must not be replayed, "" if it may.
    sites: sublayers a full evaluation keeps for conservative ones, of each block those that it has.
    replay: a block's conservative evaluation, from its own submodules and the kept features.
    """

    path: str
    parameters: tuple[str, ...]
    streams: Mapping[str, str]
    sites: tuple[Site, ...] = ()
    replay: Replay | None = None
    returns: tuple[str, ...] = ()
    batch: int = 0
    why_not: Callable[[Mapping[str, Any]], str] = lambda _call: ""

    def blocks(self, model: nn.Module) -> list[nn.Module]:
        return blocks_at(model, self.path)

    def sites_of(self, block: nn.Module) -> list[Site]:
        """Not every block of a list has every sublayer. Asked by attributes: the names of a compiled block's modules are others."""
        return [site for site in self.sites if has(block, site.module)]

    def named(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A block call's arguments by name."""
        return {**dict(zip(self.parameters, args)), **kwargs}

    def checked(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """A block call's arguments by name. Raises UnsupportedCallError where it must not be replayed."""
        named = self.named(args, kwargs)
        reason = self.why_not(named)
        if reason:
            raise UnsupportedCallError(reason)
        return named

    def inputs(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """The token streams of a block call, in order."""
        named = self.named(args, kwargs)
        return tuple(named[parameter] for parameter in self.streams)

    def stream(self, wanted: str, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """The stream of a block call that holds the tokens `wanted`, others joint with them included. Raises UnknownInputError."""
        named = self.named(args, kwargs)
        for parameter, stream in self.streams.items():
            if wanted in stream.split("+") and isinstance(named.get(parameter), Tensor):
                return named[parameter]
        raise UnknownInputError(f"{self.path} is called otherwise than described")

    def flat(self, tensor: Tensor) -> Tensor:
        """The tokens of a stream as (B, L, C), a view where that is possible."""
        return rearrange(tensor.movedim(self.batch, 0), "B ... C -> B (...) C")

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """The streams, in order, in the form the block returns them in."""
        if len(tensors) == 1:
            return tensors[0]
        named = dict(zip(self.streams, tensors))
        return tuple(named[parameter] for parameter in self.returns or self.streams)


@dataclass(frozen=True)
class ModelFamily:
    """What is known of a model beside what is found out by watching it (`discovery`).

    name: as in ComfyUI's model folder. matches: structural test on the diffusion model.
    stacks: all blocks that conservative evaluations replay, in the order the model runs them. The first one is where the input enters.
    hidden: the stream whose last state the final layer reads.
    embed: dotted path of the module whose input is the hidden stream's tokens as they enter the model, "" if there is none such;
        tokens: that input as (B, L, d), given the module.
    fused: layers that are several matrices in one, by the path of their list of blocks and by their dotted path inside the block.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    stacks: tuple[Stack, ...] = ()
    hidden: str = "img"
    embed: str = ""
    tokens: Callable[[nn.Module, Tensor], Tensor] = lambda _module, given: given
    fused: Fused = field(default_factory=lambda: MappingProxyType({}))

    def placed(self, model: nn.Module) -> list[tuple[Stack, int, nn.Module]]:
        """Every block with its stack and its index there."""
        return [(stack, i, block) for stack in self.stacks for i, block in enumerate(stack.blocks(model))]

    @property
    def is_conservative(self) -> bool:
        """Whether there is a conservative form of every block."""
        return bool(self.stacks) and all(stack.replay is not None for stack in self.stacks)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x · (1 + scale) + shift, rounded as the host's `addcmul` form is. x (B, L, C); shift, scale (B, 1, C)."""
    return torch.addcmul(shift, x, 1 + scale)

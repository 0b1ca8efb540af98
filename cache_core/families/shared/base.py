"""Types that describe a family: its name, how its blocks are replayed, its fused layers and where its input enters."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from einops import rearrange
from torch import Tensor, nn

from ...blocks import blocks_at
from ...refusals import UnknownInputError, UnsupportedCallError
from .as_read import has
from .fused import LinearPart

Fused = Mapping[str, Mapping[str, Callable[[Any], tuple[LinearPart, ...]]]]


@dataclass(frozen=True)
class Site:
    """A sublayer whose output a full evaluation keeps, as it is before its gate.

    Args:
        name: Name of the sublayer: attn, self_attn, cross_attn, mlp, output or the like.
        module: Dotted path inside the block of a submodule that the host calls.
        stream: Name of the stream whose tokens the submodule gets.
        source: Which side of that call is kept, "input" or "output".
        width: Returns, given the block, how many leading channels are kept; None keeps all.
        every: The module runs in one of this many full evaluations; in the others its kept output takes its place (see
            `EngineCall.rests`).
    """

    name: str
    module: str
    stream: str
    source: str = "output"
    width: Callable[[nn.Module], int] | None = None
    every: int = 1

    @property
    def key(self) -> str:
        """Key of the kept output among those of its block: "<stream>.<name>"."""
        return f"{self.stream}.{self.name}"


class Cached(Protocol):
    """The kept outputs of one block's sublayers as its replay reads them: for the whole batch, in the dtype and on the device of the call.

    `key` is `Site.key` in every method.
    """

    def all_tokens(self, key: str) -> Tensor:
        """Returns the kept output for all tokens, (B, L, C)."""
        ...

    def some_tokens(self, key: str, tokens: Tensor) -> Tensor:
        """Returns the kept output for the tokens with the indices `tokens` (k,), as (B, k, C)."""
        ...

    def refreshed(self, key: str, tokens: Tensor, fresh: Tensor) -> Tensor:
        """Overwrites the kept output of the tokens `tokens` (k,) with `fresh` (B, k, C), and returns that of all tokens, (B, L, C)."""
        ...

    def choose(self, stream: str, length: int) -> Tensor | None:
        """Returns the indices (k,) of the tokens to recompute in a stream of `length` tokens; None for none."""
        ...


Replay = Callable[[nn.Module, Mapping[str, Any], Cached], tuple[Tensor, ...]]


@dataclass(frozen=True)
class Stack:
    """A list of blocks of one form, which can be replayed or whose first block the network's input enters.

    Args:
        path: Dotted path of the ModuleList or ModuleDict on the network.
        parameters: Names of the block's positional parameters, in order.
        streams: Name of the stream that each token-carrying parameter holds; "txt+img" is both, concatenated in this order. A block
            returns its streams as a tuple in the order of this mapping, or as a bare tensor where there is one stream.
        sites: Sublayers whose outputs a full evaluation keeps for conservative ones. Those that a block does not have are left out for it.
        replay: Computes a block in a conservative evaluation, from its own submodules and the kept outputs. It is given the block, the
            arguments of the call by name and the kept outputs, and returns the streams in the order of `streams`.
        returns: The parameters of `streams` in the order in which the block returns them, where that is another.
        batch: Axis of the batch in the streams. Tokens may lie in a grid: (B, …, C), and (T, H, W, B, C) in Cosmos 1.
        why_not: Returns why a call with these arguments must not be replayed, "" if it may be.
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
        """Returns the blocks of this list on a network, in order."""
        return blocks_at(model, self.path)

    def sites_of(self, block: nn.Module) -> list[Site]:
        """Returns the sites that a block has: not every block of a list has every sublayer.

        They are looked up as attributes, because `named_modules` gives other names for a compiled block.
        """
        return [site for site in self.sites if has(block, site.module)]

    def named(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a block call by name."""
        return {**dict(zip(self.parameters, args)), **kwargs}

    def checked(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the arguments of a block call by name.

        Raises:
            UnsupportedCallError: If the call must not be replayed (see `why_not`).
        """
        named = self.named(args, kwargs)
        reason = self.why_not(named)
        if reason:
            raise UnsupportedCallError(reason)
        return named

    def inputs(self, args: tuple, kwargs: Mapping[str, Any]) -> tuple[Tensor, ...]:
        """Returns the token streams of a block call, in the order of `streams`."""
        named = self.named(args, kwargs)
        return tuple(named[parameter] for parameter in self.streams)

    def stream(self, wanted: str, args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
        """Returns the stream of a block call that holds the tokens named `wanted`, with any tokens that it is concatenated with.

        Raises:
            UnknownInputError: If no argument of the call is such a stream.
        """
        named = self.named(args, kwargs)
        for parameter, stream in self.streams.items():
            if wanted in stream.split("+") and isinstance(named.get(parameter), Tensor):
                return named[parameter]
        raise UnknownInputError(f"{self.path} is called with other arguments than the cache expects")

    def flat(self, tensor: Tensor) -> Tensor:
        """Returns the tokens of a stream as (B, L, C), as a view where that is possible."""
        return rearrange(tensor.movedim(self.batch, 0), "B ... C -> B (...) C")

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """Returns streams that are given in the order of `streams`, in the form in which the block returns them."""
        if len(tensors) == 1:
            return tensors[0]
        named = dict(zip(self.streams, tensors))
        return tuple(named[parameter] for parameter in self.returns or self.streams)


@dataclass(frozen=True)
class ModelFamily:
    """A description of what watching a network (`discovery`) cannot show.

    Args:
        name: Name of the family, as in ComfyUI's folder of models. Reports and sidecars use it.
        matches: Returns whether a network is of this family, judged by its class and its structure.
        stacks: All blocks that conservative evaluations replay, in the order in which the network runs them. The network's input enters
            the first block of the first stack.
        hidden: Name of the stream that the final layer reads, whose last state is the hidden state.
        embed: Dotted path of the module that embeds the input tokens of that stream; "" if the network has no such module.
        tokens: Returns the input tokens (B, L, d), given the module at `embed` and its input.
        fused: Layers that hold several matrices, by the path of their list of blocks and by their dotted path inside the block. Each
            entry returns the matrices of such a layer, given the block.
    """

    name: str
    matches: Callable[[nn.Module], bool]
    stacks: tuple[Stack, ...] = ()
    hidden: str = "img"
    embed: str = ""
    tokens: Callable[[nn.Module, Tensor], Tensor] = lambda _module, given: given
    fused: Fused = field(default_factory=lambda: MappingProxyType({}))

    def placed(self, model: nn.Module) -> list[tuple[Stack, int, nn.Module]]:
        """Returns every block of a network with its stack and its index in that stack."""
        return [(stack, i, block) for stack in self.stacks for i, block in enumerate(stack.blocks(model))]

    @property
    def is_conservative(self) -> bool:
        """Whether every block can be replayed, so that plans may have conservative evaluations."""
        return bool(self.stacks) and all(stack.replay is not None for stack in self.stacks)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Returns x·(1 + scale) + shift, with the same rounding as the host, which uses `addcmul` as well.

    Args:
        x: Tokens (B, L, C).
        shift: Shift (B, 1, C), or (B, L, C) for each token.
        scale: Scale, of the same shape as `shift`.
    """
    return torch.addcmul(shift, x, 1 + scale)

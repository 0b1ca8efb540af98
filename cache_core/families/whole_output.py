"""The last resort: families of which nothing but the model's own output is kept.

For models in which no place behind the blocks can hold a hidden state. The model is the only "block" of its family (`Stack.path` is ""):
a full evaluation runs the host's code and keeps what it returns, a skipped one is answered with the forecast of that, and nothing of the
model runs. Output is one tensor (B, channels, …) with the grid of the latent that came in, every place of which is a token; or a list of
latents, kept one behind the other.

What is given up: a skipped evaluation sees neither the latent as it is now nor the noise level's own head, so errors are larger than with
a hidden state at the same plan; no calibrated forecast, no ICC, nothing conservative. `CacheRun` tells the user so in every run that skips.
A ControlNet may be switched on or off between evaluations and would not be seen either: where one is given, nothing is skipped.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..kinds import Kind
from .base import Lengths, ModelFamily, Stack

_TEXT: Mapping[str, str] = MappingProxyType({"context": "txt"})
Counts = Callable[[Mapping[str, Any], Lengths], Lengths]
Macs = Callable[[nn.Module, Lengths], float]


def whole_output(
    name: str,
    matches: Callable[[nn.Module], bool],
    channels: Callable[[nn.Module], int],
    macs: Macs,
    parameters: tuple[str, ...] = ("x", "t", "context"),
    contexts: Mapping[str, str] = _TEXT,
    counts: Counts = lambda _call, _lengths: {},
) -> ModelFamily:
    """A family whose models are kept by their output alone, one tensor.

    channels: of that output. macs: multiply-adds of one batch row of a full evaluation, everything included.
    parameters: of the model's forward, in order, the latent first. contexts, counts: as `Stack` has them.
    """
    streams = {parameters[0]: "img"}
    stack = Stack("", parameters, streams, contexts=contexts, counts=counts, channel=1, why_not=_control)
    return _family(name, matches, stack, channels, macs)


def packed_output(
    name: str, matches: Callable[[nn.Module], bool], width: int, macs: Macs, parameters: tuple[str, ...], counts: Counts
) -> ModelFamily:
    """The same for models that take and return a list of two latents, such as video and sound.

    The host packs what is returned one behind the other, (B, 1, numbers), and leaves a tensor as it is: that is the form of the answer. It
    is kept cut into rows of `width` numbers, which their number has to be a multiple of; no more than a form to keep it in.
    counts: is given the list as "latents", None where it is no such list.
    """
    streams = {parameters[0]: "img"}
    stack = _Packed("", parameters, streams, contexts=_TEXT, counts=counts, why_not=_control_or_no_pair, width=width)
    return _family(name, matches, stack, lambda _model: width, macs)


@dataclass(frozen=True)
class _Packed(Stack):
    width: int = 1

    def named(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        named, latent = super().named(args, kwargs), self.parameters[0]
        return {**named, latent: self._rows(named[latent]), "latents": named[latent] if _is_pair(named[latent]) else None}

    def returned(self, result: Any) -> tuple[Tensor, ...]:
        return (self._rows(result),)

    def result(self, tensors: Sequence[Tensor]) -> Any:
        return tensors[0].flatten(1).unsqueeze(1)

    def _rows(self, latents: Any) -> Tensor:
        """(B, L, width)."""
        parts = list(latents) if isinstance(latents, (list, tuple)) else [latents]
        packed = torch.cat([part.flatten(1) for part in parts], dim=1)
        return packed.unflatten(1, (-1, self.width if packed.shape[1] % self.width == 0 else 1))


def _family(name: str, matches: Callable[[nn.Module], bool], stack: Stack, channels: Callable[[nn.Module], int], macs: Macs) -> ModelFamily:
    def by_kind(model: nn.Module, lengths: Lengths, kind: Kind, _share: float) -> float:
        return 0.0 if kind is Kind.AGGRESSIVE else macs(model, lengths)

    return ModelFamily(
        name=name,
        matches=matches,
        stacks=(stack,),
        hidden="img",
        channels=channels,
        embed="",
        input_channels=lambda _model: 0,
        macs=by_kind,
        outside_macs=lambda _model, _lengths: 0.0,
    )


def _is_pair(latents: Any) -> bool:
    return isinstance(latents, (list, tuple)) and len(latents) == 2 and all(part.numel() > 0 for part in latents)


def _control(call: Mapping[str, Any]) -> str:
    """The host hands None over where there is no ControlNet."""
    return "a ControlNet, which a skipped evaluation would not see" if call.get("control") is not None else ""


def _control_or_no_pair(call: Mapping[str, Any]) -> str:
    return _control(call) or ("" if call["latents"] is not None else "latents that are not two")

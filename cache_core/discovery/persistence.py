"""Checks that kept tensors hold the same tokens from one full evaluation to the next, which a single evaluation cannot show."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..refusals import UnsteadyError
from .place import Place
from .trees import Path

_FEWEST = 32  # tokens; fewer may correlate in another order by chance
_LEAST = 0.1  # correlation from which on tokens count as the same
_CHANNELS = 8  # of a sketch


def sketch(tokens: Tensor) -> Tensor:
    """Copies at most eight channels (B, L, 8) of tokens (B, L, C), in float32.

    That is enough to see whether the same tokens lie there in another evaluation.
    """
    stride = max(1, tokens.shape[-1] // _CHANNELS)
    return tokens[..., ::stride][..., :_CHANNELS].float().clone()


def persists(before: Tensor, now: Tensor) -> Tensor:
    """Returns whether two full evaluations have the same tokens in the same order. Does not wait for the device.

    It is false for a network that orders its tokens by the time, for example: what is kept at one step cannot be used at another.

    The measure is the correlation over tokens and channels, after the mean token is subtracted. With three of eight steps full, its
    least value between consecutive full evaluations is 0.40 over the models of tests/families/zoo.py (most are above 0.6), and 0.17
    between the first and the last full one of a run. The trained demo model has 0.71 even with two full steps of twelve. With the tokens
    of one of the two shuffled, no value is above 0.07 for 24 tokens or more, or above 0.13 for 12.

    Fewer than 32 tokens, values that are all the same and values that are not finite prove nothing, so the answer is true for them. Two
    changes of order are not detected: those that leave most tokens where they are, and swaps of neighbours that are alike.

    Args:
        before: Hidden state of the earlier evaluation, (B, L, C).
        now: Hidden state of the later one, (B, L, C).

    Returns:
        A bool tensor without axes.
    """
    if before.shape != now.shape or before.shape[1] < _FEWEST:
        return torch.ones((), dtype=torch.bool, device=now.device)
    one, other = (tensor.float() - tensor.mean(1, keepdim=True, dtype=torch.float32) for tensor in (before.to(now.device), now))
    return ~((one * other).sum() < _LEAST * one.norm() * other.norm())


def sketches(place: Place, given: Sequence[Tensor | None]) -> dict[Path, Tensor]:
    """Sketches what the answering block is given in place of every kept tensor.

    Args:
        given: One tensor for each that the place keeps, None where the block is given none of its shape.

    Returns:
        Sketches by the kept tensor's path in the block's result.
    """
    pairs = [(replace(kept, tokens=None), tensor) for kept, tensor in zip(place.kept, given)]
    return {kept.out: sketch(kept.of(tensor)) for kept, tensor in pairs if tensor is not None}


def check_order(before: Mapping[Path, Tensor], now: Mapping[Path, Tensor]) -> None:
    """Checks that a skip is given the same tokens, in the same order, as the skip of the proof before. Waits for the device.

    Raises:
        UnsteadyError: Where it is not.
    """
    if not all(bool(persists(before[path], now[path])) for path in before.keys() & now.keys()):
        raise UnsteadyError("the model puts its tokens in another order than before")

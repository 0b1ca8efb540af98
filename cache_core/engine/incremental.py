"""Increment-calibrated caching (ICC, arXiv 2505.05829) of every linear layer inside the blocks.

A full evaluation keeps, of every layer y = Wx + b, its output y_c and z_c = B·x_c. An incremental one answers
y_t = y_c + A·(B·x_t - z_c) in the layer's place, W ≈ A·B; all else in the block is the host's and runs as it is.
That is the paper's y_c + A·B·(x_t - x_c), rewritten exactly so that rank instead of input channels are kept.

Precision: B·x and z are in the call's own dtype. Measured in bfloat16 on every linear of the demo model, two steps of 28
apart at rank 64: rounding costs 0.31 % of y_t (rms), 0.24 % with B·x and z in float32 or with x_c kept as in the paper,
and 0.17 % is y_c's own rounding, while truncation costs 5.1 %. So float32 is not worth its memory and time.
Subtracting in float32 alone gains nothing: the difference of close numbers is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

from ..overrides import Forward, Override, around, forward_overrides, uncompiled
from ..refusals import UnsupportedCallError
from ..store import Feature, FeatureStore
from .call import EngineCall
from .linear_sites import Factors, LinearSite
from .slot import SiteKey


def keeping_layers(call: EngineCall) -> list[Override]:
    """For a full evaluation that also notes the stream lengths: keeps y_c and z_c of every layer of `call.layers`.

    A layer called in a way that `incremental` would refuse is left out. The host's results are not changed.
    """
    return [(site.module, _keeping(call, site)) for site in call.layers.sites] if call.layers is not None else []


@contextmanager
def incremental(call: EngineCall, store: FeatureStore) -> Iterator[None]:
    """An incremental evaluation: every layer answers from what the last full one kept. Only the hidden state is written.

    call.layers must be set, best with factors in the call's dtype and on its device by the time the first block is
    entered; others are converted at every use. Inside, a layer that was not kept, or is called with another shape than
    (B, L, in_features) of the anchor, raises UnsupportedCallError.
    """
    assert call.layers is not None, "plans with incremental evaluations are refused without factors"
    overrides: list[Override] = [(site.module, _calibrating(call, site, store)) for site in call.layers.sites]
    overrides += call.entry()
    overrides.append((call.last_block, around(after=call.remember_hidden)))
    with uncompiled(), forward_overrides(overrides):
        yield


def _factors(call: EngineCall) -> Factors:
    """Those of the call as they are now: a run's first call puts them in place when it reaches the first block."""
    assert call.layers is not None
    return call.layers.factors


def _keeping(call: EngineCall, site: LinearSite) -> Callable[[Forward], Forward]:
    def make(forward: Forward) -> Forward:
        numbers = count()

        def kept(*args: Any, **kwargs: Any) -> Any:
            number = next(numbers)
            tokens = _tokens(call, site, args, number)
            if tokens is None:
                return forward(*args, **kwargs)
            projection = _project(site, tokens, _factors(call))  # before the call: fp8 layers clamp their input in place
            result = forward(*args, **kwargs)
            output = site.ordered(result).reshape(*tokens.shape[:2], result.shape[-1])
            for slot, y, z in zip(call.slots, call.rows(output), call.rows(projection)):
                slot.remember_layer(_numbered(site.output_key, number), y)
                slot.remember_layer(_numbered(site.projection_key, number), z)
            return result

        return kept

    return make


def _calibrating(call: EngineCall, site: LinearSite, store: FeatureStore) -> Callable[[Forward], Forward]:
    def make(_forward: Forward) -> Forward:
        number = 0

        def substituted(*args: Any, **_kwargs: Any) -> Tensor:
            nonlocal number
            tokens = _tokens(call, site, args, number)
            if tokens is None:
                raise UnsupportedCallError(f"{site.name} is called with another shape or more often than before")
            # copies even of one: y is added to below
            y = torch.cat(_features(call, site, _numbered(site.output_key, number), store, tokens))
            z = torch.cat(_features(call, site, _numbered(site.projection_key, number), store, tokens))
            _add_increment(site, tokens, _factors(call), y.flatten(0, 1), z.flatten(0, 1))
            number += 1
            return y.reshape(*site.ordered(args[0]).shape[:-1], -1).movedim(0, site.batch)

        return substituted

    return make


def _add_increment(site: LinearSite, x: Tensor, factors: Factors, y: Tensor, z: Tensor) -> None:
    """Adds A·(B·x - z) of every part to its outputs in y (B·L, out_features), in place."""
    increments = (_project(site, x, factors).flatten(0, 1) - z).split(site.ranks(factors), dim=-1)
    for part, increment in zip(site.parts, increments):
        target = y if part.rows is None else y[:, part.rows]
        torch.addmm(target, increment, _factor(factors, f"{site.key(part)}.A", x).T, out=target)


def _project(site: LinearSite, x: Tensor, factors: Factors) -> Tensor:
    """B·x of all parts side by side (B, L, sum of ranks)."""
    projected = [F.linear(x, _factor(factors, f"{site.key(part)}.B", x)) for part in site.parts]
    return projected[0] if len(projected) == 1 else torch.cat(projected, dim=-1)


def _factor(factors: Factors, name: str, like: Tensor) -> Tensor:
    return factors[name].to(device=like.device, dtype=like.dtype, non_blocking=True)


def _numbered(key: SiteKey, number: int) -> SiteKey:
    """For the layer's call of this number: of a layer that gets its tokens in pieces, each is kept on its own."""
    return (*key[:2], f"{key[2]}{number}") if number else key


def _tokens(call: EngineCall, site: LinearSite, args: Sequence[Any], number: int) -> Tensor | None:
    """The input of the layer's call of this number as (B, L, in_features); the tokens may lie in a grid.

    None where it is not what this call was given when the layer was found. Groups of tokens are put side by side again, in whatever
    order they come: it is the same one for y_c and z_c.
    """
    if not args or args[0].ndim < 3 or number >= len(site.tokens) or args[0].shape[-1] != site.in_features:
        return None
    x, length = site.ordered(args[0]), site.tokens[number]
    if x[..., 0].numel() % (length * len(call.slots)):
        return None
    return x.reshape(-1, length, site.in_features)


def _features(call: EngineCall, site: LinearSite, key: SiteKey, store: FeatureStore, like: Tensor) -> list[Tensor]:
    """What each slot keeps under `key`, in row order, in the dtype and on the device of the input."""
    features: list[Feature] = []
    for slot in call.slots:
        feature = slot.layers.get(key)
        if feature is None or feature.data.shape[:2] != (like.shape[0] // len(call.slots), like.shape[1]):
            raise UnsupportedCallError(f"nothing of this shape is kept of {site.name}")
        features.append(feature)
    return [store.load(feature, like) for feature in features]

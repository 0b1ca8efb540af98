"""Carries out an incremental evaluation: increment-calibrated caching (ICC, arXiv 2505.05829) of every linear layer inside the blocks.

For every layer y = Wx + b with W ≈ A·B, a full evaluation keeps the output y_c and z_c = B·x_c. An incremental one
answers y_t = y_c + A·(B·x_t - z_c) in the layer's place. Everything else in the block is the host's and runs as it is.
This is the paper's y_c + A·B·(x_t - x_c), rewritten exactly so that z_c (rank channels) is kept instead of x_c (input channels).

Precision: B·x and z are in the call's own dtype. This was measured in bfloat16 on every linear layer of the demo model,
two steps of 28 apart, at rank 64. Rounding costs 0.31 % of y_t (rms), or 0.24 % with B·x and z in float32 or with x_c
kept as in the paper; 0.17 % is y_c's own rounding. Truncation to the rank costs 5.1 %, so float32 is not worth its
memory and time. To subtract in float32 alone gains nothing, as the difference of close numbers is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from einops import rearrange
from torch import Tensor

from ..overrides import Forward, Override, around, forward_overrides, uncompiled
from ..refusals import UnsupportedCallError
from ..store import Feature, FeatureStore
from .call import EngineCall
from .linear_sites import Factors, LinearSite
from .slot import SiteKey


def keeping_layers(call: EngineCall) -> list[Override]:
    """Returns the overrides of a full evaluation that keep y_c and z_c of every layer of `call.layers`, none where it has no layers.

    A layer that is called in a way that `incremental` would refuse is left out. The host's results are not changed.
    """
    return [(site.module, _keeping(call, site)) for site in call.layers.sites] if call.layers is not None else []


@contextmanager
def incremental(call: EngineCall, store: FeatureStore) -> Iterator[None]:
    """Makes every linear layer answer from what the last full evaluation kept. Of this evaluation only the hidden state is kept.

    `call.layers` must be set. Its factors should be in the call's dtype and on its device by the time the first block is
    entered; others are converted at every use.

    Raises:
        UnsupportedCallError: In the host's call, where a layer was not kept, or is called with another shape (B, L, in_features) than in
            the full evaluation.
    """
    assert call.layers is not None, "plans with incremental evaluations are refused without factors"
    overrides: list[Override] = [(site.module, _incrementing(call, site, store)) for site in call.layers.sites]
    overrides += call.entry()
    overrides.append((call.last_block, around(after=call.remember_hidden)))
    with uncompiled(), forward_overrides(overrides):
        yield


def _factors(call: EngineCall) -> Factors:
    """Returns the call's factors as they are now. They are moved to its device only when it reaches the first block."""
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
            projection = _project(site, tokens, _factors(call))  # before the call, as fp8 layers clamp their input in place
            result = forward(*args, **kwargs)
            output = rearrange(site.ordered(result), "... C -> (...) C").unflatten(0, tokens.shape[:2])
            for slot, y, z in zip(call.slots, call.rows(output), call.rows(projection)):
                slot.remember_layer(_numbered(site.output_key, number), y)
                slot.remember_layer(_numbered(site.projection_key, number), z)
            return result

        return kept

    return make


def _incrementing(call: EngineCall, site: LinearSite, store: FeatureStore) -> Callable[[Forward], Forward]:
    def make(_forward: Forward) -> Forward:
        number = 0

        def substituted(*args: Any, **_kwargs: Any) -> Tensor:
            nonlocal number
            tokens = _tokens(call, site, args, number)
            if tokens is None:
                raise UnsupportedCallError(f"{site.name} is called with another shape or more often than before")
            # torch.cat also copies a single tensor: y is written to below
            y = torch.cat(_features(call, site, _numbered(site.output_key, number), store, tokens))
            z = torch.cat(_features(call, site, _numbered(site.projection_key, number), store, tokens))
            _add_increment(site, tokens, _factors(call), y.flatten(0, 1), z.flatten(0, 1))
            number += 1
            return y.reshape(*site.ordered(args[0]).shape[:-1], -1).movedim(0, site.batch)

        return substituted

    return make


def _add_increment(site: LinearSite, x: Tensor, factors: Factors, y: Tensor, z: Tensor) -> None:
    """Adds A·(B·x - z) of every part to its channels of y (B·L, out_features), in place. z: (B·L, sum of ranks)."""
    increments = (_project(site, x, factors).flatten(0, 1) - z).split(site.ranks(factors), dim=-1)
    for part, increment in zip(site.parts, increments):
        target = y if part.rows is None else y[:, part.rows]
        torch.addmm(target, increment, _factor(factors, f"{site.key(part)}.A", x).T, out=target)


def _project(site: LinearSite, x: Tensor, factors: Factors) -> Tensor:
    """Returns B·x of all parts side by side, (B, L, sum of ranks)."""
    projected = [F.linear(x, _factor(factors, f"{site.key(part)}.B", x)) for part in site.parts]
    return projected[0] if len(projected) == 1 else torch.cat(projected, dim=-1)


def _factor(factors: Factors, name: str, like: Tensor) -> Tensor:
    return factors[name].to(device=like.device, dtype=like.dtype, non_blocking=True)


def _numbered(key: SiteKey, number: int) -> SiteKey:
    """Returns the key for one of a layer's calls. A layer may be given its tokens in pieces, which are kept separately."""
    return (*key[:2], f"{key[2]}{number}") if number else key


def _tokens(call: EngineCall, site: LinearSite, args: Sequence[Any], number: int) -> Tensor | None:
    """Returns the input of a layer's call as (B, L, in_features), also of tokens that lie in a grid.

    None where it does not have the shape that this call had when the layer was found. Groups of tokens are joined again in whatever
    order they come, which is the same for y_c and z_c.

    Args:
        number: Number of the layer's call within the evaluation.
    """
    if not args or args[0].ndim < 3 or number >= len(site.tokens) or args[0].shape[-1] != site.in_features:
        return None
    x, length = site.ordered(args[0]), site.tokens[number]
    if x[..., 0].numel() % (length * len(call.slots)):
        return None
    return x.reshape(-1, length, site.in_features)


def _features(call: EngineCall, site: LinearSite, key: SiteKey, store: FeatureStore, like: Tensor) -> list[Tensor]:
    """Returns what each slot keeps under `key`, in row order, in the dtype and on the device of `like`.

    Raises:
        UnsupportedCallError: Where a slot keeps nothing there, or not for as many rows and tokens.
    """
    features: list[Feature] = []
    for slot in call.slots:
        feature = slot.layers.get(key)
        if feature is None or feature.data.shape[:2] != (like.shape[0] // len(call.slots), like.shape[1]):
            raise UnsupportedCallError(f"nothing of this shape is kept of {site.name}")
        features.append(feature)
    return [store.load(feature, like) for feature in features]

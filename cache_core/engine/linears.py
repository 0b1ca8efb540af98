"""Increment-calibrated caching (ICC, arXiv 2505.05829) of every linear layer inside the blocks.

A full evaluation keeps, of every layer y = Wx + b, its output y_c and z_c = B·x_c. A calibrated one answers
y_t = y_c + A·(B·x_t - z_c) in the layer's place, W ≈ A·B; all else in the block is the host's and runs as it is.
That is the paper's y_c + A·B·(x_t - x_c), rewritten exactly so that rank instead of input channels are kept.

Precision: B·x and z are in the call's own dtype. Measured in bfloat16 on every linear of the demo model, two steps of 28
apart at rank 64: rounding costs 0.31 % of y_t (rms), 0.24 % with B·x and z in float32 or with x_c kept as in the paper,
and 0.17 % is y_c's own rounding, while truncation costs 5.1 %. So float32 is not worth its memory and time.
Subtracting in float32 alone gains nothing: the difference of close numbers is exact.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from ..families.base import Lengths, ModelFamily, UnsupportedCallError, stream_length
from ..families.flux_linears import LinearPart, StackLinears
from ..store import Feature, FeatureStore, StoreFormat
from .call import EngineCall
from .overrides import Forward, Override, around, forward_overrides
from .slot import SiteKey

Factors = Mapping[str, Tensor]  # "<part key>.A" (outputs, rank) and "<part key>.B" (rank, inputs)
Ranks = int | Factors  # one rank for all, cut to each part's size, or the factors themselves


@dataclass(frozen=True)
class LinearSite:
    """One linear layer of one block.

    stack: path of the block's stack. index: of the block there. layer: dotted path inside the block.
    parts: the matrices it is made of. stream: whose tokens it works on.
    """

    stack: str
    index: int
    layer: str
    module: nn.Module
    parts: tuple[LinearPart, ...]
    stream: str
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.index}.{self.layer}"

    @property
    def output_key(self) -> SiteKey:
        """Of the kept output y_c, (B, L, out_features)."""
        return self.stack, self.index, f"{self.layer}#y"

    @property
    def projection_key(self) -> SiteKey:
        """Of the kept z_c = B·x_c of all parts side by side, (B, L, sum of ranks)."""
        return self.stack, self.index, f"{self.layer}#z"

    def key(self, part: LinearPart) -> str:
        """Name of a part; its factors add .A and .B to it."""
        return f"{self.name}.{part.name}"

    def inputs(self, part: LinearPart) -> int:
        """Input channels of a part."""
        return _size(part.cols, self.in_features)

    def outputs(self, part: LinearPart) -> int:
        """Output channels of a part."""
        return _size(part.rows, self.out_features)

    def ranks(self, ranks: Ranks) -> list[int]:
        """The rank of every part, in order."""
        if isinstance(ranks, int):
            return [min(ranks, self.inputs(part), self.outputs(part)) for part in self.parts]
        return [ranks[f"{self.key(part)}.B"].shape[0] for part in self.parts]


def find_linears(family: ModelFamily, model: nn.Module, linears: Iterable[StackLinears]) -> list[LinearSite]:
    """All linear layers inside the family's blocks whose input is per token, in the order of the blocks.

    A linear layer is what has `in_features` and `out_features`: quantised and wrapped ones need not be `nn.Linear`.
    linears: one description per stack. Raises ValueError for a stack or a layer that is not described.
    """
    rules = {rule.path: rule for rule in linears}
    sites: list[LinearSite] = []
    for stack, index, block in family.placed(model):
        if stack.path not in rules:
            raise ValueError(f"{family.name}: the linear layers of {stack.path} are not described")
        sites += _sites_of_block(rules[stack.path], index, getattr(block, "_orig_mod", block))  # a compiled block wraps the real one
    return sites


def check_factors(sites: Iterable[LinearSite], factors: Factors) -> None:
    """Raises ValueError, naming the part, where factors are missing or do not have the model's shapes."""
    for site in sites:
        for part in site.parts:
            key = site.key(part)
            a, b = factors.get(f"{key}.A"), factors.get(f"{key}.B")
            if a is None or b is None:
                raise ValueError(f"there are no factors for {key}: they were made for another model")
            if (a.shape[0], b.shape[1]) != (site.outputs(part), site.inputs(part)) or a.shape[1] != b.shape[0]:
                raise ValueError(f"the factors of {key} are {tuple(a.shape)} and {tuple(b.shape)}: they were made for another model")


def listening_linears(call: EngineCall, sites: Iterable[LinearSite], factors: Factors) -> AbstractContextManager[None]:
    """Around a full evaluation, inside `listening` (which notes the stream lengths): keeps y_c and z_c of every layer.

    A layer called in a way that `calibrated` would refuse is left out. The host's results are not changed.
    """
    return forward_overrides([(site.module, _keeping(call, site, factors)) for site in sites])


def calibrated(call: EngineCall, sites: Iterable[LinearSite], factors: Factors, store: FeatureStore) -> AbstractContextManager[None]:
    """A calibrated evaluation: every layer answers from what the last full one kept. Only the hidden state is written.

    factors: best in the call's dtype and on its device; others are converted at every use. Inside, a layer that was
    not kept, or is called with another shape than (B, L, in_features) of the anchor, raises UnsupportedCallError.
    """
    overrides: list[Override] = [(site.module, _calibrating(call, site, factors, store)) for site in sites]
    overrides += call.entry()
    overrides.append((call.placed[-1][2], around(after=call.remember_hidden)))
    return forward_overrides(overrides)


def dense_macs(sites: Iterable[LinearSite], lengths: Lengths) -> float:
    """Multiply-adds of the layers in a full evaluation, per batch row.

    Blocks in a calibrated evaluation cost family.macs(full) - dense_macs + icc_macs.
    """
    return float(sum(stream_length(site.stream, lengths) * site.in_features * site.out_features for site in sites))


def icc_macs(sites: Iterable[LinearSite], lengths: Lengths, ranks: Ranks) -> float:
    """Multiply-adds of the layers in a calibrated evaluation, per batch row: tokens · rank · (inputs + outputs) over all parts."""
    return float(sum(stream_length(site.stream, lengths) * n for site in sites for n in _part_weights(site, ranks)))


def anchor_macs(sites: Iterable[LinearSite], lengths: Lengths, ranks: Ranks) -> float:
    """Multiply-adds that a full evaluation costs more per batch row for z_c: tokens · rank · inputs over all parts."""
    total = 0
    for site in sites:
        per_token = sum(rank * site.inputs(part) for part, rank in zip(site.parts, site.ranks(ranks)))
        total += stream_length(site.stream, lengths) * per_token
    return float(total)


def icc_bytes(sites: Iterable[LinearSite], lengths: Lengths, ranks: Ranks, dtype: torch.dtype, fmt: StoreFormat = StoreFormat()) -> int:
    """Bytes kept per batch row of a model that computes in `dtype`: tokens · (out_features + sum of ranks) · bytes of a number."""
    total = 0
    for site in sites:
        per_token = fmt.bytes_per_token(site.out_features, dtype) + fmt.bytes_per_token(sum(site.ranks(ranks)), dtype)
        total += stream_length(site.stream, lengths) * per_token
    return total


def _size(place: slice | None, whole: int) -> int:
    return whole if place is None else len(range(whole)[place])


def _part_weights(site: LinearSite, ranks: Ranks) -> list[int]:
    return [rank * (site.inputs(part) + site.outputs(part)) for part, rank in zip(site.parts, site.ranks(ranks))]


def _sites_of_block(rule: StackLinears, index: int, block: nn.Module) -> list[LinearSite]:
    sites: list[LinearSite] = []
    for layer, module in block.named_modules():
        if not (hasattr(module, "in_features") and hasattr(module, "out_features")) or layer.startswith(rule.skip):
            continue
        if sites and layer.startswith(f"{sites[-1].layer}."):
            continue  # inside a wrapper that is itself called as the layer
        sizes = int(module.in_features), int(module.out_features)
        sites.append(LinearSite(rule.path, index, layer, module, rule.parts_of(block, layer), rule.stream(layer), *sizes))
    return sites


def _keeping(call: EngineCall, site: LinearSite, factors: Factors) -> Callable[[Forward], Forward]:
    def make(forward: Forward) -> Forward:
        has_run = False

        def kept(*args: Any, **kwargs: Any) -> Any:
            nonlocal has_run
            tokens = None if has_run else _tokens(call, site, args)
            has_run = True
            if tokens is None:
                return forward(*args, **kwargs)
            projection = _project(site, tokens, factors)  # before the call: fp8 layers clamp their input in place
            result = forward(*args, **kwargs)
            for slot, y, z in zip(call.slots, call.rows(result), call.rows(projection)):
                slot.remember_sublayer(site.output_key, y)
                slot.remember_sublayer(site.projection_key, z)
            return result

        return kept

    return make


def _calibrating(call: EngineCall, site: LinearSite, factors: Factors, store: FeatureStore) -> Callable[[Forward], Forward]:
    def make(_forward: Forward) -> Forward:
        has_run = False

        def substituted(*args: Any, **_kwargs: Any) -> Tensor:
            nonlocal has_run
            tokens = _tokens(call, site, args)
            if tokens is None or has_run:
                raise UnsupportedCallError(f"{site.name} is called with another shape or more than once")
            has_run = True
            y = torch.cat(_features(call, site, site.output_key, store, tokens))  # a copy even of one: it is added to below
            z = torch.cat(_features(call, site, site.projection_key, store, tokens))
            _add_increment(site, tokens, factors, y.flatten(0, 1), z.flatten(0, 1))
            return y

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
    projected = [F.linear(x if part.cols is None else x[..., part.cols], _factor(factors, f"{site.key(part)}.B", x)) for part in site.parts]
    return projected[0] if len(projected) == 1 else torch.cat(projected, dim=-1)


def _factor(factors: Factors, name: str, like: Tensor) -> Tensor:
    return factors[name].to(device=like.device, dtype=like.dtype, non_blocking=True)


def _tokens(call: EngineCall, site: LinearSite, args: Sequence[Any]) -> Tensor | None:
    """The layer's input if it is (B, L, in_features) with all tokens of its stream."""
    if not args or not call.lengths:
        return None
    x = args[0]
    is_known = x.ndim == 3 and x.shape[1:] == (stream_length(site.stream, call.lengths), site.in_features)
    return x if is_known and x.shape[0] % len(call.slots) == 0 else None


def _features(call: EngineCall, site: LinearSite, key: SiteKey, store: FeatureStore, like: Tensor) -> list[Tensor]:
    """What each slot keeps under `key`, in row order, in the dtype and on the device of the input."""
    features: list[Feature] = []
    for slot in call.slots:
        feature = slot.sublayers.get(key)
        if feature is None or feature.data.shape[:2] != (like.shape[0] // len(call.slots), like.shape[1]):
            raise UnsupportedCallError(f"nothing of this shape is kept of {site.name}")
        features.append(feature)
    return [store.load(feature, like) for feature in features]

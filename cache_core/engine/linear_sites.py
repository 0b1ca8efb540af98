"""Where the linear layers of a model are and the low-rank factors that stand in for them (ICC, arXiv 2505.05829): shapes and costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor, nn

from ..families.base import Lengths, ModelFamily, stream_length
from ..families.linears import LinearPart, StackLinears
from ..kinds import Kind
from ..store import StoreFormat
from .slot import SiteKey

Factors = Mapping[str, Tensor]  # "<part key>.A" (outputs, rank) and "<part key>.B" (rank, inputs)
Ranks = int | Factors  # one rank for all, cut to each part's size, or the factors themselves


@dataclass(frozen=True)
class LinearSite:
    """One linear layer of one block.

    stack: path of the block's stack. index: of the block there. layer: dotted path inside the block.
    parts: the matrices it is made of. stream: whose tokens it works on. is_grouped: they come in groups (B·groups, L/groups, C).
    in_pieces: it may get them in several calls. batch: axis of the batch in its input and its output.
    """

    stack: str
    index: int
    layer: str
    module: nn.Module
    parts: tuple[LinearPart, ...]
    stream: str
    in_features: int
    out_features: int
    is_grouped: bool = False
    in_pieces: bool = False
    batch: int = 0

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

    def ordered(self, tensor: Tensor) -> Tensor:
        """The layer's input or output as a view (B, …, C)."""
        return tensor.movedim(self.batch, 0)

    def outputs(self, part: LinearPart) -> int:
        """Output channels of a part."""
        return _size(part.rows, self.out_features)

    def ranks(self, ranks: Ranks) -> list[int]:
        """The rank of every part, in order."""
        if isinstance(ranks, int):
            return [min(ranks, self.in_features, self.outputs(part)) for part in self.parts]
        return [ranks[f"{self.key(part)}.B"].shape[0] for part in self.parts]


@dataclass(frozen=True, eq=False)
class CalibratedLinears:
    """The linear layers of one model and the factors of all of them. Made by `bind`.

    place: device and dtype of all factors, None while they are as they were given. Compared by identity: it holds tensors.
    """

    sites: tuple[LinearSite, ...]
    factors: Factors
    place: tuple[torch.device, torch.dtype] | None = None

    @classmethod
    def bind(cls, family: ModelFamily, model: nn.Module, factors: Factors) -> CalibratedLinears:
        """For the layers that `model` has now. factors: as `Factors` names them; those of other layers do no harm.

        Raises ValueError where the family describes no linear layers, or factors are missing or of another model's shapes.
        """
        sites = find_linears(family, model)
        check_factors(sites, factors)
        return cls(tuple(sites), factors)

    def placed(self, device: torch.device, dtype: torch.dtype) -> CalibratedLinears:
        """The same with the factors of these layers on that device in that dtype, so that no evaluation converts them."""
        if self.place == (device, dtype):
            return self
        names = [f"{site.key(part)}.{side}" for site in self.sites for part in site.parts for side in "AB"]
        factors = {name: self.factors[name].to(device=device, dtype=dtype) for name in names}
        return replace(self, factors=factors, place=(device, dtype))

    def extra_macs(self, kind: Kind, lengths: Lengths) -> float:
        """Multiply-adds per batch row beyond those of the host's own blocks: positive for a full evaluation that keeps
        what calibrated ones need, negative for a calibrated one. No other kind has any to do with these layers."""
        if kind is Kind.FULL:
            return anchor_macs(self.sites, lengths, self.factors)
        assert kind is Kind.CALIBRATED, "the layers of other kinds are not ours"
        return icc_macs(self.sites, lengths, self.factors) - dense_macs(self.sites, lengths)

    @property
    def weight_share(self) -> float:
        """Multiply-adds of the factors as a share of the layers' own, each layer taken once per token."""
        dense = sum(site.in_features * site.out_features for site in self.sites)
        return sum(n for site in self.sites for n in _part_weights(site, self.factors)) / dense

    def bytes(self, lengths: Lengths, dtype: torch.dtype, fmt: StoreFormat) -> int:
        """Bytes kept per batch row of a model that computes in `dtype`; the factors themselves are not counted."""
        return icc_bytes(self.sites, lengths, self.factors, dtype, fmt)


def find_linears(family: ModelFamily, model: nn.Module) -> list[LinearSite]:
    """All linear layers inside the family's blocks whose input is per token, in the order of the blocks, then those beside them.

    A linear layer is what has `in_features` and `out_features`: quantised and wrapped ones need not be `nn.Linear`.
    Raises ValueError for a stack or a layer that the family's `linears` do not describe.
    """
    rules = {rule.path: rule for rule in family.linears}
    sites: list[LinearSite] = []
    for stack, index, block in family.placed(model):
        if stack.path not in rules:
            raise ValueError(f"{family.name}: the linear layers of {stack.path} are not described")
        sites += _sites_of_block(rules[stack.path], index, getattr(block, "_orig_mod", block))  # a compiled block wraps the real one
    beside = [rule for rule in family.linears if rule.path not in {stack.path for stack in family.stacks}]
    for rule in beside:
        for index, module in enumerate(attrgetter(rule.path)(model)):
            sites += _sites_of_block(rule, index, module)
    return sites


def check_factors(sites: Iterable[LinearSite], factors: Factors) -> None:
    """Raises ValueError, naming the part, where factors are missing or do not have the model's shapes."""
    for site in sites:
        for part in site.parts:
            key = site.key(part)
            a, b = factors.get(f"{key}.A"), factors.get(f"{key}.B")
            if a is None or b is None:
                raise ValueError(f"there are no factors for {key}: they were made for another model")
            if (a.shape[0], b.shape[1]) != (site.outputs(part), site.in_features) or a.shape[1] != b.shape[0]:
                raise ValueError(f"the factors of {key} are {tuple(a.shape)} and {tuple(b.shape)}: they were made for another model")


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
        per_token = sum(rank * site.in_features for part, rank in zip(site.parts, site.ranks(ranks)))
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
    return [rank * (site.in_features + site.outputs(part)) for part, rank in zip(site.parts, site.ranks(ranks))]


def _sites_of_block(rule: StackLinears, index: int, block: nn.Module) -> list[LinearSite]:
    sites: list[LinearSite] = []
    for layer, module in block.named_modules():
        if not (hasattr(module, "in_features") and hasattr(module, "out_features")) or layer.startswith(rule.skip):
            continue
        if sites and layer.startswith(f"{sites[-1].layer}."):
            continue  # inside a wrapper that is itself called as the layer
        sizes = int(module.in_features), int(module.out_features)
        parts, stream = rule.parts_of(block, layer), rule.stream(layer)
        is_grouped, in_pieces = layer.startswith(rule.grouped), layer.startswith(rule.pieces)
        sites.append(LinearSite(rule.path, index, layer, module, parts, stream, *sizes, is_grouped, in_pieces, rule.batch))
    return sites

"""The linear layers of a model and the low-rank factors that stand in for them (ICC, arXiv 2505.05829): shapes and costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..blocks import blocks_at
from ..discovery.layers import LayerCall, LayerKey
from ..families.base import ModelFamily
from ..families.fused import UNSPLIT, LinearPart
from ..refusals import UnsupportedCallError
from ..store import StoreFormat
from .slot import SiteKey

Factors = Mapping[str, Tensor]  # "<part key>.A" (outputs, rank) and "<part key>.B" (rank, inputs)
Ranks = int | Factors  # one rank for all, cut to each part's size, or the factors themselves


@dataclass(frozen=True)
class LinearSite:
    """One linear layer of one block.

    stack: path of the block's list. index: of the block there. layer: dotted path inside the block. parts: the matrices it is made of.
    tokens: of a batch row, in each call that an evaluation makes of it. batch: axis of the batch in its input and its output, or of
    batch times groups where tokens come in groups (B·groups, L/groups, C).
    """

    stack: str
    index: int
    layer: str
    module: nn.Module
    parts: tuple[LinearPart, ...]
    tokens: tuple[int, ...]
    in_features: int
    out_features: int
    batch: int = 0

    @property
    def name(self) -> str:
        return f"{self.stack}.{self.index}.{self.layer}"

    @property
    def output_key(self) -> SiteKey:
        """Of the kept output y_c, (B, L, out_features)."""
        return self.stack, self.index, f"{self.layer}.y"

    @property
    def projection_key(self) -> SiteKey:
        """Of the kept z_c = B·x_c of all parts side by side, (B, L, sum of ranks)."""
        return self.stack, self.index, f"{self.layer}.z"

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
class FactorisedLayers:
    """The linear layers of one model and the factors of all of them. Made by `bind`.

    place: device and dtype of all factors, None while they are as they were given. Compared by identity: it holds tensors.
    """

    sites: tuple[LinearSite, ...]
    factors: Factors
    place: tuple[torch.device, torch.dtype] | None = None

    @classmethod
    def bind(cls, sites: Iterable[LinearSite], factors: Factors) -> FactorisedLayers:
        """Those of the sites that there are factors for; others are left to the host.

        Raises UnsupportedCallError where there are none at all, ValueError for factors of another model's shapes.
        """
        own = [site for site in sites if all(f"{site.key(part)}.{side}" in factors for part in site.parts for side in "AB")]
        if not own:
            raise UnsupportedCallError("none of the layers that there are factors for is given tokens")
        check_shapes(own, factors)
        return cls(tuple(own), factors)

    def placed(self, device: torch.device, dtype: torch.dtype, ready: Factors) -> FactorisedLayers:
        """The same with the factors of these layers on that device in that dtype, so that no evaluation converts them.

        ready: factors that are there already.
        """
        if self.place == (device, dtype):
            return self
        names = [f"{site.key(part)}.{side}" for site in self.sites for part in site.parts for side in "AB"]
        factors = {name: ready[name] if name in ready else self.factors[name].to(device=device, dtype=dtype) for name in names}
        return replace(self, factors=factors, place=(device, dtype))

    def bytes(self, dtype: torch.dtype, fmt: StoreFormat) -> int:
        """Bytes kept per batch row of a model that computes in `dtype`; the factors themselves are not counted."""
        return icc_bytes(self.sites, self.factors, dtype, fmt)


def weight_share(factors: Factors) -> float:
    """Multiply-adds of the factors as a share of the layers' own, each layer taken once per token."""
    pairs = [(factors[f"{name[:-2]}.A"], b) for name, b in factors.items() if name.endswith(".B")]
    dense = sum(a.shape[0] * b.shape[1] for a, b in pairs)
    return sum(b.shape[0] * (a.shape[0] + b.shape[1]) for a, b in pairs) / max(dense, 1)


def linear_sites(family: ModelFamily, calls: Mapping[LayerKey, LayerCall], network: nn.Module) -> list[LinearSite]:
    """The linear layers that were found to be given tokens, as the network has them now.

    family: says which of them are several matrices in one.
    """
    sites: list[LinearSite] = []
    for (path, index, layer), call in calls.items():
        block: Any = blocks_at(network, path)[index]
        block = getattr(block, "_orig_mod", block)
        module = attrgetter(layer)(block) if layer else block
        split = family.fused.get(path, {}).get(layer)
        parts = (UNSPLIT,) if split is None else split(block)
        sites.append(
            LinearSite(path, index, layer, module, parts, call.tokens, int(module.in_features), int(module.out_features), call.batch)
        )
    return sites


def check_factors(network: nn.Module, factors: Factors) -> None:
    """Raises ValueError, naming the part, where factors are for layers that the network has not, or of other shapes."""
    for name, b in factors.items():
        if not name.endswith(".B"):
            continue
        key, a = name[:-2], factors.get(f"{name[:-2]}.A")
        layer = key.rpartition(".")[0]
        try:
            module = network.get_submodule(_with_numbers(network, layer))
            sizes = int(module.out_features), int(module.in_features)  # type: ignore[arg-type]
        except AttributeError:
            raise ValueError(f"there are factors for {layer}, which this model has not: they were made for another model") from None
        if a is None or a.shape[0] > sizes[0] or b.shape[1] != sizes[1] or a.shape[1] != b.shape[0]:
            raise ValueError(f"the factors of {key} do not have the model's shapes: they were made for another model")


def _with_numbers(network: nn.Module, layer: str) -> str:
    """The layer's path on the network: blocks are numbered where a ModuleDict has names, and compiled ones hold the real one."""
    module, path = network, []
    for step in layer.split("."):
        if isinstance(module, nn.ModuleDict) and step not in module and step.isdigit() and int(step) < len(module):
            step = list(module)[int(step)]
        module = getattr(module, step)
        path.append(step)
        if hasattr(module, "_orig_mod"):
            module = module._orig_mod
            path.append("_orig_mod")
    return ".".join(path)


def check_shapes(sites: Iterable[LinearSite], factors: Factors) -> None:
    """Raises ValueError, naming the part, where factors are missing or do not have the model's shapes."""
    for site in sites:
        for part in site.parts:
            key = site.key(part)
            a, b = factors.get(f"{key}.A"), factors.get(f"{key}.B")
            if a is None or b is None:
                raise ValueError(f"there are no factors for {key}: they were made for another model")
            if (a.shape[0], b.shape[1]) != (site.outputs(part), site.in_features) or a.shape[1] != b.shape[0]:
                raise ValueError(f"the factors of {key} are {tuple(a.shape)} and {tuple(b.shape)}: they were made for another model")


def icc_bytes(sites: Iterable[LinearSite], ranks: Ranks, dtype: torch.dtype, fmt: StoreFormat = StoreFormat()) -> int:
    """Bytes kept per batch row of a model that computes in `dtype`: tokens · (out_features + sum of ranks) · bytes of a number."""
    total = 0
    for site in sites:
        per_token = fmt.bytes_per_token(site.out_features, dtype) + fmt.bytes_per_token(sum(site.ranks(ranks)), dtype)
        total += sum(site.tokens) * per_token
    return total


def _size(place: slice | None, whole: int) -> int:
    return whole if place is None else len(range(whole)[place])

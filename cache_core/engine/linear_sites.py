"""Describes the linear layers of a model and the low-rank factors that replace them (ICC, arXiv 2505.05829), with their costs."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from operator import attrgetter

import torch
from torch import Tensor, nn

from ..blocks import blocks_at, unwrapped
from ..discovery.layers import LayerCall, LayerKey
from ..families.shared.base import ModelFamily
from ..families.shared.fused import UNSPLIT, LinearPart
from ..refusals import UnsupportedCallError
from ..store import StoreFormat
from .slot import SiteKey

Factors = Mapping[str, Tensor]  # "<part key>.A" (outputs, rank) and "<part key>.B" (rank, inputs)
Ranks = int | Factors  # one rank for all parts, cut to the size of each, or the factors themselves


@dataclass(frozen=True)
class LinearSite:
    """One linear layer of one block.

    Args:
        stack: Path of the block's list.
        index: Index of the block there.
        layer: Dotted path of the layer inside the block.
        module: The layer itself.
        parts: The matrices it is made of.
        tokens: Number of tokens per batch row, for each of its calls in one evaluation.
        in_features: Input channels.
        out_features: Output channels, of all parts together.
        batch: Axis of the batch in its input and output. Where tokens come in groups, (B·groups, L/groups, C), it is the axis of both.
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
        """Key of the kept output y_c, (B, L, out_features)."""
        return self.stack, self.index, f"{self.layer}.y"

    @property
    def projection_key(self) -> SiteKey:
        """Key of the kept z_c = B·x_c of all parts side by side, (B, L, sum of ranks)."""
        return self.stack, self.index, f"{self.layer}.z"

    def key(self, part: LinearPart) -> str:
        """Returns the name of a part, to which its factors add .A and .B."""
        return f"{self.name}.{part.name}"

    def ordered(self, tensor: Tensor) -> Tensor:
        """Returns the layer's input or output as a view (B, …, C)."""
        return tensor.movedim(self.batch, 0)

    def outputs(self, part: LinearPart) -> int:
        """Returns the number of output channels of a part."""
        return _size(part.rows, self.out_features)

    def ranks(self, ranks: Ranks) -> list[int]:
        """Returns the rank of every part, in order."""
        if isinstance(ranks, int):
            return [min(ranks, self.in_features, self.outputs(part)) for part in self.parts]
        return [ranks[f"{self.key(part)}.B"].shape[0] for part in self.parts]


@dataclass(frozen=True, eq=False)
class FactorisedLayers:
    """The linear layers of one network, with factors for each. Made by `bind`, and compared by identity as it holds tensors.

    Args:
        sites: The layers.
        factors: Their factors, by name; there may be more.
        located: Device and dtype of the factors, None while they are as they were given.
    """

    sites: tuple[LinearSite, ...]
    factors: Factors
    located: tuple[torch.device, torch.dtype] | None = None

    @classmethod
    def bind(cls, sites: Iterable[LinearSite], factors: Factors) -> FactorisedLayers:
        """Binds factors to those of the sites that they are for. Other layers are left to the host.

        Raises:
            UnsupportedCallError: Where there are factors for none of the sites.
            ValueError: Where factors have another model's shapes.
        """
        own = [site for site in sites if all(f"{site.key(part)}.{side}" in factors for part in site.parts for side in "AB")]
        if not own:
            raise UnsupportedCallError("none of the layers with low-rank factors receives tokens")
        check_shapes(own, factors)
        return cls(tuple(own), factors)

    def placed(self, device: torch.device, dtype: torch.dtype, ready: Factors) -> FactorisedLayers:
        """Returns the same layers with their factors on this device and in this dtype, so that no evaluation converts them.

        Args:
            ready: Factors that are there already, by name.
        """
        if self.located == (device, dtype):
            return self
        names = [f"{site.key(part)}.{side}" for site in self.sites for part in site.parts for side in "AB"]
        factors = {name: ready[name] if name in ready else self.factors[name].to(device=device, dtype=dtype) for name in names}
        return replace(self, factors=factors, located=(device, dtype))

    def bytes(self, dtype: torch.dtype, fmt: StoreFormat) -> int:
        """Returns the bytes that are kept per batch row of a model that computes in `dtype`. The factors themselves are not counted."""
        return icc_bytes(self.sites, self.factors, dtype, fmt)


def weight_share(factors: Factors) -> float:
    """Returns the multiply-adds of the factors as a share of the layers' own, with each layer called once per token."""
    pairs = [(factors[f"{name[:-2]}.A"], b) for name, b in factors.items() if name.endswith(".B")]
    dense = sum(a.shape[0] * b.shape[1] for a, b in pairs)
    return sum(b.shape[0] * (a.shape[0] + b.shape[1]) for a, b in pairs) / max(dense, 1)


def linear_sites(family: ModelFamily, calls: Mapping[LayerKey, LayerCall], network: nn.Module) -> list[LinearSite]:
    """Returns the linear layers that are given tokens, as the network has them now.

    Args:
        family: Says which of them are several matrices in one.
        calls: The calls of the layers that were found to be given tokens.
        network: The network.
    """
    sites: list[LinearSite] = []
    for (path, index, layer), call in calls.items():
        block = unwrapped(blocks_at(network, path)[index])
        module = attrgetter(layer)(block) if layer else block
        split = family.fused.get(path, {}).get(layer)
        parts = (UNSPLIT,) if split is None else split(block)
        sites.append(
            LinearSite(path, index, layer, module, parts, call.tokens, int(module.in_features), int(module.out_features), call.batch)
        )
    return sites


def check_factors(network: nn.Module, factors: Factors) -> None:
    """Checks that the network has the layers that factors are for, in their shapes.

    Raises:
        ValueError: Where it does not; the text names the part.
    """
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
    """Returns a layer's real path on the network: factors number the blocks of a ModuleDict and ignore the wrappers of compiled ones."""
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
    """Checks that there are factors for every part of these layers, in their shapes.

    Raises:
        ValueError: Where there are not; the text names the part.
    """
    for site in sites:
        for part in site.parts:
            key = site.key(part)
            a, b = factors.get(f"{key}.A"), factors.get(f"{key}.B")
            if a is None or b is None:
                raise ValueError(f"there are no factors for {key}: they were made for another model")
            if (a.shape[0], b.shape[1]) != (site.outputs(part), site.in_features) or a.shape[1] != b.shape[0]:
                raise ValueError(f"the factors of {key} are {tuple(a.shape)} and {tuple(b.shape)}: they were made for another model")


def icc_bytes(sites: Iterable[LinearSite], ranks: Ranks, dtype: torch.dtype, fmt: StoreFormat = StoreFormat()) -> int:
    """Returns the bytes kept per batch row, for a model that computes in `dtype`: tokens · (out_features + ranks) · bytes per number."""
    total = 0
    for site in sites:
        per_token = fmt.bytes_per_token(site.out_features, dtype) + fmt.bytes_per_token(sum(site.ranks(ranks)), dtype)
        total += sum(site.tokens) * per_token
    return total


def _size(part: slice | None, total: int) -> int:
    return total if part is None else len(range(total)[part])

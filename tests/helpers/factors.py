"""Makes factors of linear layers that lose nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from comfyui_duca.cache_core.engine.linear_sites import LinearSite
from torch import Tensor


def exact_factors(sites: Iterable[LinearSite]) -> dict[str, Tensor]:
    """Returns, for every part of every layer, the layer's matrix as A and the identity as B."""
    factors = {}
    for site in sites:
        for part in site.parts:
            own = site.module.weight.detach()[part.rows or slice(None)]
            factors |= {f"{site.key(part)}.A": own.clone(), f"{site.key(part)}.B": torch.eye(own.shape[1])}
    return factors

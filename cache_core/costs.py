"""What a plan will cost, before it is run."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import NamedTuple

from torch import nn

from .families import ModelFamily
from .kinds import Kind, Plan
from .meter import CallShape
from .schedule import CONSERVATIVE_COST
from .strategy import Strategy, predicted_bytes, row_macs

# As shares of a full evaluation, for a model not known yet: FLUX.1 at 1024x1024, counted; calibrated ones at rank 128.
_USUAL = MappingProxyType({Kind.FULL: 1.0, Kind.CALIBRATED: 0.2, Kind.AGGRESSIVE: 0.0002})


class Costs(NamedTuple):
    """compute: multiply-adds of the run as a share of those without a cache. bytes: of the cache at most, None where not known.

    is_counted: for this model; else a usual one's costs were taken.
    """

    compute: float
    bytes: int | None
    is_counted: bool


def expected_costs(strategy: Strategy, plan: Plan, known: tuple[ModelFamily, nn.Module, CallShape] | None) -> Costs:
    """known: the family, the model, and what its calls are like."""
    if known is None:
        usual = {**_USUAL, Kind.CONSERVATIVE: CONSERVATIVE_COST * strategy.token_share}
        return Costs(_share(plan, usual), None, False)
    family, model, shape = known

    def cost(kind: Kind) -> float:
        linears = strategy.linears if kind is Kind.CALIBRATED else None
        return row_macs(strategy.token_share, family, model, shape.lengths, kind, linears)

    shares = {kind: cost(kind) / cost(Kind.FULL) for kind in Kind if plan.has(kind)}
    needed = predicted_bytes(strategy, plan, family, model, shape.lengths, shape.rows, shape.dtype)
    return Costs(_share(plan, shares), needed, True)


def _share(plan: Plan, costs: Mapping[Kind, float]) -> float:
    return sum(plan.count(kind) * cost for kind, cost in costs.items()) / max(len(plan), 1)

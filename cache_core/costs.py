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
from .strategy import Strategy, predicted_bytes

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
    outside = family.outside_macs(model, shape.lengths)
    costs = dict.fromkeys(Kind, outside)
    for kind in (Kind.FULL, Kind.CONSERVATIVE, Kind.AGGRESSIVE):
        if plan.has(kind) or kind is Kind.FULL:
            costs[kind] += family.macs(model, shape.lengths, kind, strategy.token_share)
    if strategy.linears is not None:
        costs[Kind.CALIBRATED] = costs[Kind.FULL] + strategy.linears.extra_macs(Kind.CALIBRATED, shape.lengths)
    shares = {kind: cost / costs[Kind.FULL] for kind, cost in costs.items()}
    needed = predicted_bytes(strategy, plan, family, model, shape.lengths, shape.rows, shape.dtype)
    return Costs(_share(plan, shares), needed, True)


def _share(plan: Plan, costs: Mapping[Kind, float]) -> float:
    return sum(plan.count(kind) * cost for kind, cost in costs.items()) / max(len(plan), 1)

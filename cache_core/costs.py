"""Estimates what a plan will cost before it is run: multiply-adds and bytes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import TYPE_CHECKING, NamedTuple

from .discovery.places import CallShape, Known
from .engine.linear_sites import Factors, weight_share
from .planning.kinds import Kind
from .planning.plan import Plan
from .store import StoreFormat

if TYPE_CHECKING:
    from .strategy import Strategy

# Costs for a model that was not sampled yet, as shares of a full evaluation, counted on FLUX.1 at 1024x1024.
_CONSERVATIVE = 0.7  # times the share of tokens: 0.071 at share 0.1
_INCREMENTAL = 0.2  # at rank 128
_ATTENTION = 0.1  # of an incremental evaluation, besides what its factors cost; 0.15 was counted
_SKIPPED = 0.0002


class Costs(NamedTuple):
    """What a run will cost.

    Args:
        compute: Multiply-adds as a share of those without a cache.
        bytes: Bytes of the cache at most, None where they are not known.
        is_counted: Whether the model was sampled before, so that its full evaluations were counted. If not, all costs are those of a usual
            model.
    """

    compute: float
    bytes: int | None
    is_counted: bool


def assumed_costs(token_share: float, factors: Factors | None = None) -> dict[Kind, float]:
    """Returns what an evaluation of each kind costs as a share of a full one, before anything is counted.

    Skipped ones are left out, as they cost next to nothing.

    Args:
        token_share: Share of the tokens that conservative evaluations recompute, 0..1.
        factors: Low-rank factors of incremental evaluations, where they are known.
    """
    incremental = _INCREMENTAL if factors is None else weight_share(factors) + _ATTENTION
    return {Kind.FULL: 1.0, Kind.INCREMENTAL: incremental, Kind.CONSERVATIVE: _CONSERVATIVE * token_share}


def expected_costs(strategy: Strategy, plan: Plan, shape: CallShape | None) -> Costs:
    """Returns what a run with this plan will cost. Kinds that were not counted yet cost as on a usual model.

    Args:
        shape: What earlier calls were like, None where there were none.
    """
    usual = {**assumed_costs(strategy.token_share, strategy.factors), Kind.SKIPPED: _SKIPPED}
    if shape is None or shape.known.place is None:
        return Costs(_share(plan, usual), None, False)
    counted = {kind: shape.known.costs.get(cost_key(kind, strategy)) for kind in Kind}
    shares = {kind: usual[kind] if macs is None else macs / shape.known.macs for kind, macs in counted.items()}
    share = _share(plan, shares)
    anchor = shape.known.costs.get(anchor_key(strategy))
    if anchor is not None:
        keeping = sum(kind is Kind.FULL and plan.has(Kind.INCREMENTAL, step) for step, kind in enumerate(plan.kinds))
        share += keeping * (anchor / shape.known.macs - shares[Kind.FULL]) / len(plan)
    return Costs(share, shape.slots * slot_bytes(strategy, plan, shape), True)


def cost_key(kind: Kind, strategy: Strategy) -> Hashable:
    """Returns the key under which `Known.costs` has the multiply-adds of a kind. Strategies with the same key cost the same."""
    if kind is Kind.SKIPPED and strategy.predictor.uses_input:
        return kind, "corrected"
    if kind is Kind.CONSERVATIVE:
        return kind, strategy.token_share
    if kind is Kind.INCREMENTAL and strategy.factors is not None:
        return kind, weight_share(strategy.factors)
    return kind


def anchor_key(strategy: Strategy) -> Hashable:
    """Returns the key of full evaluations that keep what incremental ones need, which costs more."""
    return Kind.FULL, cost_key(Kind.INCREMENTAL, strategy)


def slot_bytes(strategy: Strategy, plan: Plan, shape: CallShape, first_step: int = 0) -> int:
    """Returns the bytes that the cache will hold for one slot when its history is full.

    Args:
        shape: What the calls are like.
        first_step: Step at which the slot is met. Its first evaluation is full whatever the plan says.
    """
    known, fmt = shape.known, strategy.storage
    assert known.place is not None, "nothing is kept where there is no place"
    writes = 1 + sum(kind is not Kind.SKIPPED for kind in plan.kinds[first_step + 1 :])
    kept = sum(kept.rows_and_tokens * fmt.bytes_per_token(kept.shape[-1], kept.dtype) for kept in known.place.kept)
    if strategy.predictor.uses_input and shape.input_channels:
        first = known.place.kept[0]
        kept += first.rows_and_tokens * fmt.bytes_per_token(shape.input_channels, first.dtype)
    total = kept * min(strategy.predictor.history, writes)
    if plan.has(Kind.CONSERVATIVE, first_step):
        total += known.rows * _sublayer_bytes(known, fmt)
    total //= 1 if known.place.is_joint else known.conds
    return total + (shape.layer_bytes if plan.has(Kind.INCREMENTAL, first_step) else 0)


def _sublayer_bytes(known: Known, fmt: StoreFormat) -> int:
    assert known.place is not None
    return sum(tokens * fmt.bytes_per_token(channels, known.place.kept[0].dtype) for tokens, channels in known.sublayers)


def _share(plan: Plan, costs: Mapping[Kind, float]) -> float:
    return sum(plan.count(kind) * cost for kind, cost in costs.items()) / max(len(plan), 1)

"""Keeps account of what the calls of one run cost: multiply-adds, counted at the first call of each kind, and bytes, predicted."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from .costs import anchor_key, cost_key, slot_bytes
from .discovery.flops import counted
from .discovery.places import CallShape
from .engine import EngineCall, Slot, SlotTable
from .meter import Evaluation, RunReport
from .model_call import ModelCall
from .overrides import uncompiled
from .planning.kinds import Kind
from .planning.plan import Plan
from .store import FeatureStore
from .strategy import Strategy


class Accounts:
    """Keeps account of the calls of one run.

    Args:
        plan: The plan of the run.
        report: The report in which predictions are entered.
        store: Keeps the features.
        choose_device: Is called with the bytes that will be kept and returns the device to keep them on, None for the model's. Without
            it, `store.format` decides.
    """

    def __init__(
        self, plan: Plan, report: RunReport, store: FeatureStore, choose_device: Callable[[int], torch.device | None] | None
    ) -> None:
        self._plan, self._report, self._store, self._choose_device = plan, report, store, choose_device
        self._past: dict[Hashable, float] = {}  # multiply-adds of calls that go past the cache

    @contextmanager
    def counting(self, engine: EngineCall, strategy: Strategy, kind: Kind) -> Iterator[None]:
        """Counts the multiply-adds of the call inside the context, and enters them in `engine.known.costs`.

        Counting takes time, so it is done only for the first call with each key.
        """
        key = _key(engine, strategy, kind)
        if key in engine.known.costs:
            yield
            return
        with uncompiled(), counted() as macs:
            yield
        if engine.is_finished:
            engine.known.costs[key] = macs.so_far

    def add(self, evaluation: Evaluation, engine: EngineCall, strategy: Strategy, kind: Kind) -> None:
        """Enters a call that was carried out in the evaluation, unless another node answered for the model."""
        if engine.is_touched:
            evaluation.add_call(kind, engine.known.costs.get(_key(engine, strategy, kind), 0.0), engine.known.macs)

    def past_the_cache(self, call: ModelCall, compute: Callable[[], Tensor]) -> tuple[Tensor, float]:
        """Returns the answer of a call without the cache, and its multiply-adds: 0 where another node answered for the model."""
        key = call.model, call.likeness
        if key in self._past:
            return compute(), self._past[key]
        with uncompiled(), counted() as macs:
            result = compute()
        self._past[key] = macs.so_far
        return result, self._past[key]

    def predict(self, engine: EngineCall, new: Sequence[Slot], slots: SlotTable, strategy: Strategy, step: int) -> None:
        """Predicts the bytes of new slots, and chooses the device where nothing is kept yet.

        Args:
            engine: The call that the slots are for.
            new: The new ones among its slots.
            slots: All slots of the run.
            strategy: What the run does.
            step: The step at which the slots are met.
        """
        known, layer_bytes = engine.known, 0
        if engine.layers is not None:
            layer_bytes = known.rows // len(engine.slots) * engine.layers.bytes(engine.dtype, strategy.storage)
        shape = CallShape(known, len(slots), engine.given.channels if engine.given is not None else 0, layer_bytes)
        for slot in new:
            slot.predicted_bytes = slot_bytes(strategy, self._plan, shape, step)
        self._report.predicted_bytes = max(self._report.predicted_bytes, slots.predicted_bytes)
        self._report.shape = shape
        if self._choose_device is not None and not self._store.bytes:
            expected = max(2, len(engine.slots))  # the other cond may follow in a call of its own
            self._store.format = replace(self._store.format, device=self._choose_device(expected * new[0].predicted_bytes))


def _key(engine: EngineCall, strategy: Strategy, kind: Kind) -> Hashable:
    """Returns the key of a call's costs (`costs.cost_key`). A full one costs more with `layers` to keep, less where sublayers rest."""
    if kind is Kind.FULL and engine.layers is not None:
        return anchor_key(strategy)
    return (kind, engine.rests) if engine.rests else cost_key(kind, strategy)

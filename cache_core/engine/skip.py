"""A skipped (aggressive) evaluation: blocks pass their input through, the last one returns the forecast.

Embedding, ControlNet additions to the last block and the final layer stay the host's and run at the current
noise level. What ControlNet adds to passed-through tensors vanishes with them: the forecast hidden already
contains its effect, so nothing is counted twice. Where the model itself is the only block (`families/whole_output.py`)
nothing of it runs. A call that a family cannot skip (`Stack.why_not`) is computed in full instead.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from ..families.base import Stack
from ..predictors import Predictor
from ..store import FeatureStore
from .call import EngineCall
from .overrides import Forward, Override, forward_overrides
from .slot import Slot


def skipping(call: EngineCall, predictor: Predictor, store: FeatureStore) -> AbstractContextManager[None]:
    """Every slot of the call must hold at least one anchor."""
    passing = {stack.path: _passing(stack) for stack, _, _ in call.placed}
    overrides: list[Override] = [(block, passing[stack.path]) for stack, _, block in call.placed[:-1]]
    overrides.append((call.placed[-1][2], _answering(call, predictor, store)))
    overrides += [(module, _instead(answer)) for module, answer in call.family.idle(call.model)]
    overrides += call.entry()
    return forward_overrides(overrides)


def forecast(slot: Slot, predictor: Predictor, time: float, store: FeatureStore, like: Tensor) -> Tensor:
    """The predictor's combination of a slot's anchors: a new tensor (rows, L, C) in the dtype of `like`."""
    weights = predictor.weights([anchor.time for anchor in slot.anchors], time)
    terms = [(w, anchor.hidden) for w, anchor in zip(weights, slot.anchors) if w]
    if len(terms) == 1 and terms[0][0] == 1.0:
        return store.load(terms[0][1], like).clone()
    total: Tensor | None = None
    for weight, feature in terms:  # float32: weights of mixed sign would cost half-precision digits
        value = store.load(feature, like)
        total = value.float() * weight if total is None else total.add_(value, alpha=weight)
    assert total is not None, "weights of a predictor sum to one, so not all are zero"
    return total.to(like.dtype)


def _correction(call: EngineCall, predictor: Predictor, store: FeatureStore) -> Tensor:
    """The embedded input, and what the input's innovation adds to the combination of history (METHOD section 3)."""
    assert call.input is not None and call.embedded is not None
    parts = []
    for slot, tokens in zip(call.slots, call.rows(call.input)):
        times = [anchor.time for anchor in slot.anchors]
        innovation = tokens.float()
        for weight, anchor in zip(predictor.weights(times, call.time), slot.anchors):
            assert anchor.input is not None
            innovation = innovation - weight * store.load(anchor.input, innovation)
        parts.append(innovation @ predictor.correction(times, call.time).to(innovation.device))
    return torch.cat(parts).to(call.embedded.dtype) + call.embedded


def _bounded(call: EngineCall, store: FeatureStore, hidden: Tensor) -> Tensor:
    """The forecast, with the newest anchor's values where it is not finite; the slots remember that."""
    latest = torch.cat([store.load(slot.anchors[-1].hidden, hidden) for slot in call.slots])
    if call.embedded is not None:
        latest += call.embedded
    for slot, rows in zip(call.slots, call.rows(hidden)):
        slot.note_answer(rows)
    return torch.where(torch.isfinite(hidden), hidden, latest)


def _passing(stack: Stack) -> Any:
    def passed(*args: Any, **kwargs: Any) -> Any:
        return stack.result(_inputs(stack, args, kwargs))

    return lambda _forward: passed


def _inputs(stack: Stack, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    stack.checked(args, kwargs)
    return stack.inputs(args, kwargs)


def _instead(answer: Forward) -> Callable[[Forward], Forward]:
    return lambda _forward: answer


def _answering(call: EngineCall, predictor: Predictor, store: FeatureStore) -> Any:
    def answer(*args: Any, **kwargs: Any) -> Any:
        tensors = list(_inputs(call.last_stack, args, kwargs))
        call.is_touched = True
        if not call.lengths:
            return call.last_stack.result(tensors)
        with call.unrecorded():
            return filled(tensors)

    def filled(tensors: list[Tensor]) -> Any:
        index, place = call.hidden_place()
        x = call.last_stack.flat(tensors[index])
        hidden = torch.cat([forecast(slot, predictor, call.time, store, x) for slot in call.slots])
        if call.keeps_input:
            hidden += _correction(call, predictor, store)
        if hidden.dtype is torch.float16:  # the only dtype that a forecast from finite anchors can leave
            hidden = _bounded(call, store, hidden)
        if place != slice(0, x.shape[1]):  # with the tokens that are not forecast around it
            hidden = torch.cat((x[:, : place.start], hidden, x[:, place.stop :]), dim=1)
        tensors[index] = call.last_stack.grid(hidden, tensors[index])
        call.is_finished = True
        return call.last_stack.result(tensors)

    def make(_forward: Forward) -> Forward:
        return answer

    return make

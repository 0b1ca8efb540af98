"""Carries out a skipped evaluation (DuCa: aggressive): blocks hand on what they are given, and the last one returns the forecast.

Embedding, ControlNet additions to the last block and the final layer stay the host's and run at the current
noise level. What a ControlNet adds to tensors that are handed on vanishes with them. The forecast hidden state already
contains its effect, so nothing is counted twice. Where the network itself is the only block (`Place.is_whole_output`),
nothing of it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ..discovery.persistence import check_order, sketches
from ..overrides import forward_overrides, uncompiled
from ..predictors import Predictor
from ..store import FeatureStore
from .call import EngineCall
from .inputs import ModelInput
from .slot import Slot


@contextmanager
def skipping(call: EngineCall, predictor: Predictor, store: FeatureStore) -> Iterator[None]:
    """Answers with the predictor's forecast in place of the blocks. Every slot of the call must hold at least one anchor.

    The skip that checks the order of tokens runs uncompiled: reading the result of the check would break the graph of a compiled model,
    and of every later skip, into pieces.

    Raises:
        UnsteadyError: In the host's call, where the model puts its tokens in another order than before.
        UnsupportedCallError: In the host's call, where a block gets other arguments or shapes than when the place was found.
    """

    def answer(given: Sequence[Tensor | None]) -> list[Tensor]:
        call.is_touched = True
        if call.sketches:
            check_order(call.sketches, sketches(call.place, given))
        hidden = [_filled(call, predictor, store, number, like) for number, like in enumerate(given)]
        call.is_finished = True
        return hidden

    def reached() -> None:
        call.is_touched = True  # by any block, as hosts and nodes may leave out the first and the last one

    overrides = [*call.place.skip(call.model, answer, call.unrecorded, reached), *call.entry()]
    with uncompiled() if call.sketches else nullcontext(), forward_overrides(overrides):
        yield


def forecast(slot: Slot, predictor: Predictor, time: float, store: FeatureStore, like: Tensor, number: int = 0) -> Tensor:
    """Returns the predictor's combination of a slot's anchors.

    Args:
        time: The model's time of the evaluation.
        like: Tensor whose dtype and device the forecast gets.
        number: Index of the tensor, where the place keeps several.

    Returns:
        A new tensor (rows, L, C).
    """
    weights = predictor.weights([anchor.time for anchor in slot.anchors], time)
    terms = [(w, anchor.hidden[number]) for w, anchor in zip(weights, slot.anchors) if w]
    if len(terms) == 1 and terms[0][0] == 1.0:
        return store.load(terms[0][1], like).clone()
    total: Tensor | None = None
    for weight, feature in terms:  # in float32, as weights of mixed sign would lose digits in half precision
        value = store.load(feature, like)
        total = value.float() * weight if total is None else total.add_(value, alpha=weight)
    assert total is not None, "a predictor gives some anchor a weight"
    return total.to(like.dtype)


def _filled(call: EngineCall, predictor: Predictor, store: FeatureStore, number: int, given: Tensor | None) -> Tensor:
    """Returns the tensor (B, L, C) that takes the place of `given`, for the kept tensor of this number."""
    device = call.device if given is None else given.device
    like = torch.empty(0, dtype=call.place.kept[number].dtype, device=device)
    hidden = torch.cat([forecast(slot, predictor, call.time, store, like, number) for slot in call.slots])
    if call.given is not None and number == 0:
        hidden += _correction(call, call.given, predictor, store, hidden)
        hidden = call.given.added(hidden, call.place)
    if hidden.dtype is torch.float16:  # the only dtype whose range a forecast from finite anchors can leave
        hidden = _bounded(call, store, hidden, number)
    return hidden


def _correction(call: EngineCall, given: ModelInput, predictor: Predictor, store: FeatureStore, hidden: Tensor) -> Tensor:
    """Returns what the input's innovation adds to the combination of anchors (the formula is in `calibration.statistics`)."""
    parts = []
    for slot, tokens in zip(call.slots, call.rows(given.tokens(hidden, call.place))):
        times = [anchor.time for anchor in slot.anchors]
        innovation = tokens.float()
        for weight, anchor in zip(predictor.weights(times, call.time), slot.anchors):
            assert anchor.input is not None
            innovation = innovation - weight * store.load(anchor.input, innovation)
        parts.append(innovation @ predictor.correction(times, call.time).to(innovation.device))
    return torch.cat(parts).to(hidden.dtype)


def _bounded(call: EngineCall, store: FeatureStore, hidden: Tensor, number: int) -> Tensor:
    """Returns the forecast, with the newest anchor's values where it is not finite, and notes in the slots whether it was."""
    latest = torch.cat([store.load(slot.anchors[-1].hidden[number], hidden) for slot in call.slots])
    if call.given is not None and number == 0:
        latest = call.given.added(latest, call.place)
    for slot, rows in zip(call.slots, call.rows(hidden)):
        slot.note_answer(rows)
    return torch.where(torch.isfinite(hidden), hidden, latest)

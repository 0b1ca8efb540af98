"""Keeps the features of each cond during a run."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..discovery.persistence import persists
from ..store import Feature, FeatureStore

SiteKey = tuple[str, int, str]  # stack path, block index, site name
Variant = frozenset[tuple[str, Hashable]]  # options that change what a network computes, by name


class Anchor(NamedTuple):
    """A kept hidden state with its time.

    Args:
        time: The model's time at which it was computed.
        hidden: One feature for each tensor that the place keeps, minus the embedded input where there is an `input`.
        input: The input tokens, where the predictor uses them, else None.
    """

    time: float
    hidden: tuple[Feature, ...]
    input: Feature | None


class Slot:
    """The features of one cond.

    Args:
        store: Keeps the features.
        history: Number of anchors that are kept at most.

    Attributes:
        anchors: The kept hidden states, oldest first.
        sublayers: Outputs of sublayers for conservative evaluations.
        layers: Outputs and projected inputs of linear layers for incremental evaluations.
        signature: Shape, dtype and so on of the calls that the features came from. With another one, the slot starts anew.
        last_used: Index of the evaluation that last asked for the slot.
        in_pass: Number, from 1, of the pass over the conds in which that evaluation asked for it.
        predicted_bytes: Bytes that the slot will hold when its history is full, 0 before they are predicted.
    """

    def __init__(self, store: FeatureStore, history: int) -> None:
        self.signature: Hashable = None
        self.last_used, self.in_pass = -1, 0
        self.predicted_bytes = 0
        self.anchors: list[Anchor] = []
        self.sublayers: dict[SiteKey, Feature] = {}
        self.layers: dict[SiteKey, Feature] = {}
        self._rests: Counter[SiteKey] = Counter()  # full evaluations that a kept sublayer has answered since it was computed
        self._kept: list[Tensor] = []  # sums of hidden states, finite only where all values are. They are read at the next check,
        self._answered: list[Tensor] = []  # as reading them at once would make a GPU wait. The same of answers
        self._alike: list[Tensor] = []  # whether the second hidden state holds the same tokens as the first
        self._is_compared = False
        self._store = store
        self.history = history

    def remember_hidden(self, time: float, hidden: Sequence[Tensor], tokens: Tensor | None = None) -> None:
        """Adds an anchor. It replaces one of the same time, and the oldest is dropped when there are too many.

        Args:
            time: The model's time.
            hidden: (rows, L, C) for each tensor that the place keeps.
            tokens: Input tokens (rows, L, d), where the predictor uses them.
        """
        if self.anchors and self.anchors[-1].time == time:
            self._drop(self.anchors.pop())
        if len(self.anchors) == self.history:
            self._drop(self.anchors.pop(0))
        if len(self.anchors) == 1 and not self._is_compared:  # only once: minus the embedded input, later ones may differ more and more
            self._is_compared = True
            with self._store.unrecorded():
                before = [self._store.load(feature, tensor) for feature, tensor in zip(self.anchors[0].hidden, hidden)]
                self._alike += [persists(one, other) for one, other in zip(before, hidden)]
        kept = tuple(self._store.put(tensor) for tensor in hidden)
        self.anchors.append(Anchor(time, kept, None if tokens is None else self._store.put(tokens)))
        with self._store.unrecorded():
            self._kept += [tensor.sum(dtype=torch.float32) for tensor in hidden]

    def note_answer(self, hidden: Tensor) -> None:
        """Notes the forecast (rows, L, C) of a skipped evaluation, where it may not be finite, for the next check."""
        self._answered.append(hidden.sum(dtype=torch.float32))

    def is_steady(self) -> bool:
        """Returns whether the hidden states compared since the last call hold the same tokens in the same order. Waits for the device."""
        alike = all(bool(each) for each in self._alike)
        self._alike.clear()
        return alike

    def checked(self) -> tuple[bool, bool]:
        """Returns whether all hidden states kept, and all forecasts noted, since the last check are finite. Waits for the device.

        Where a kept one is not, every feature is dropped.
        """
        is_kept, is_answered = (all(math.isfinite(total.item()) for total in totals) for totals in (self._kept, self._answered))
        self._kept.clear()
        self._answered.clear()
        if not is_kept:
            self.reset(self.signature)
        return is_kept, is_answered

    def remember_sublayer(self, key: SiteKey, output: Tensor) -> None:
        """Keeps a sublayer's output (rows, L, C) in place of the one before."""
        self._replace(self.sublayers, key, output)
        self._rests[key] = 0

    def can_rest(self, key: SiteKey, every: int) -> bool:
        """Returns whether a sublayer's kept output may answer one more full evaluation, if it is computed in one of `every`."""
        return key in self.sublayers and self._rests[key] + 1 < every

    def rest(self, key: SiteKey, like: Tensor) -> Tensor:
        """Returns a sublayer's kept output (rows, L, C) for a full evaluation, in the dtype and on the device of `like`."""
        self._rests[key] += 1
        return self._store.load(self.sublayers[key], like)

    def remember_layer(self, key: SiteKey, value: Tensor) -> None:
        """Keeps the output or the projected input (rows, L, C) of a linear layer in place of the one before."""
        self._replace(self.layers, key, value)

    def reset(self, signature: Hashable = None) -> None:
        """Drops every feature. `signature` is that of the calls to come."""
        for anchor in self.anchors:
            self._drop(anchor)
        for features in (self.sublayers, self.layers):
            for feature in features.values():
                self._store.drop(feature)
            features.clear()
        self.anchors.clear()
        self._rests.clear()
        self._kept.clear()
        self._alike.clear()
        self._is_compared = False
        self.signature = signature

    def _replace(self, features: dict[SiteKey, Feature], key: SiteKey, value: Tensor) -> None:
        if key in features:
            self._store.drop(features.pop(key))
        features[key] = self._store.put(value)

    def _drop(self, anchor: Anchor) -> None:
        for feature in anchor.hidden:
            self._store.drop(feature)
        if anchor.input is not None:
            self._store.drop(anchor.input)


class _Key(NamedTuple):
    """Identifies a slot.

    Args:
        cond: The cond.
        variant: The options that change what the network computes for it.
        occurrence: Number of earlier passes of the same evaluation with this cond and variant.
    """

    cond: Hashable
    variant: Variant = frozenset()
    occurrence: int = 0


class SlotTable:
    """Finds the slots of a run by cond and by what the network computes for it.

    The first pass over the conds in an evaluation is the sampler's own. Later passes are for other conds, or for guidance that runs the
    same conds through a changed network (SLG, PAG …). These have slots of their own, which are dropped after an evaluation without them.
    """

    def __init__(self, store: FeatureStore, history: int) -> None:
        self._store, self._history = store, history
        self._slots: dict[_Key, Slot] = {}
        self._seen: Counter[tuple] = Counter()  # (cond, variant) in earlier passes of this evaluation
        self._in_pass: set[tuple] = set()  # in the present pass
        self._repeated: set[tuple] = set()  # met twice in one pass at any time: their calls cannot be told apart, not even the first
        self._evaluation = -1
        self._number = 1

    def __len__(self) -> int:
        return len(self._slots)

    def begin(self, evaluation: int) -> None:
        """Begins an evaluation. They are numbered from 0."""
        self._evaluation, self._number = evaluation, 0
        self._seen.clear()
        self._in_pass.clear()
        idle = [key for key, slot in self._slots.items() if slot.in_pass > 1 and slot.last_used < evaluation - 1]
        for key in idle:
            self._slots.pop(key).reset()
        if idle:
            self._store.trim()

    def checked(self) -> tuple[bool, bool]:
        """Returns whether all slots kept, and answered with, only finite values since the last check; see `Slot.checked`."""
        results = [slot.checked() for slot in self._slots.values()]
        return all(kept for kept, _ in results), all(answered for _, answered in results)

    def is_steady(self) -> bool:
        """Returns whether all slots are steady; see `Slot.is_steady`."""
        unsteady = [slot for slot in self._slots.values() if not slot.is_steady()]  # every slot is asked, as each forgets what it compared
        return not unsteady

    def next_pass(self) -> None:
        """Begins another pass over the conds of this evaluation."""
        self._number += 1
        self._seen.update(self._in_pass)
        self._in_pass.clear()

    def slots_of(self, conds: Sequence[Hashable], variant: Variant, signature: Hashable) -> list[Slot] | None:
        """Returns the slots of a call's conds, in order. A slot is emptied where the signature has changed.

        None once a cond has occurred twice in one pass, as its calls cannot be told apart from then on.
        """
        wanted = [(cond, variant) for cond in conds]
        if len(set(wanted)) < len(wanted) or self._in_pass.intersection(wanted):
            self._repeated.update(wanted)
        if self._repeated.intersection(wanted):
            return None
        self._in_pass.update(wanted)
        return [self._slot(_Key(cond, variant, self._seen[cond, variant]), signature) for cond in conds]

    def others_of(self, cond: Hashable, variant: Variant) -> list[Variant]:
        """Returns the other variants that the evaluation before asked for with this cond."""
        return [key.variant for key, slot in self._slots.items() if key.cond == cond and key.variant != variant
                and slot.last_used == self._evaluation - 1]  # fmt: skip

    @property
    def predicted_bytes(self) -> int:
        return sum(slot.predicted_bytes for slot in self._slots.values())

    def without_inputs(self, history: int) -> None:
        """Empties every slot with anchors that were kept with their input. From here on, each slot keeps at most `history` anchors."""
        self._history = history
        for slot in self._slots.values():
            if any(anchor.input is not None for anchor in slot.anchors):
                slot.reset(slot.signature)
            slot.history = history
        self._store.trim()

    def clear(self) -> None:
        """Forgets every slot and frees the store."""
        self._slots.clear()
        self._store.clear()

    def _slot(self, key: _Key, signature: Hashable) -> Slot:
        slot = self._slots.setdefault(key, Slot(self._store, self._history))
        slot.last_used, slot.in_pass = self._evaluation, self._number
        if slot.signature != signature:
            slot.reset(signature)
            self._store.trim()
        return slot

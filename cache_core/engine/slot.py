"""What is kept of each cond during a run."""

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
    """A computed hidden state, one feature for each tensor that is kept of it, the model's time at which it was computed and, where the
    predictor uses it, its input.

    With an input, `hidden` is without the embedded input.
    """

    time: float
    hidden: tuple[Feature, ...]
    input: Feature | None


class Slot:
    """The features of one cond: past hidden states, oldest first, sublayer outputs for conservative evaluations, and what
    incremental ones need of the linear layers.

    signature: shape, dtype and so on of the calls the features came from; another one starts anew.
    history: hidden states that are kept at most. last_used: index of the evaluation that last asked for it, in_pass: in which pass.
    predicted_bytes: what it will hold when its history is full.
    """

    def __init__(self, store: FeatureStore, history: int) -> None:
        self.signature: Hashable = None
        self.last_used, self.in_pass = -1, 0
        self.predicted_bytes = 0
        self.anchors: list[Anchor] = []
        self.sublayers: dict[SiteKey, Feature] = {}
        self.layers: dict[SiteKey, Feature] = {}
        self._rests: Counter[SiteKey] = Counter()  # full evaluations that a kept sublayer has answered since it was computed
        self._kept: list[Tensor] = []  # a sum of each hidden state not checked yet, finite where all of it is; reading it now would
        self._answered: list[Tensor] = []  # make a GPU wait. The same of answers
        self._alike: list[Tensor] = []  # whether the second hidden state is of the same tokens as the first
        self._is_compared = False
        self._store = store
        self.history = history

    def remember_hidden(self, time: float, hidden: Sequence[Tensor], tokens: Tensor | None = None) -> None:
        """Adds an anchor: hidden states (rows, L, C) and the input tokens (rows, L, d) where they are used.

        One at the same time is replaced, the oldest is dropped when there are too many.
        """
        if self.anchors and self.anchors[-1].time == time:
            self._drop(self.anchors.pop())
        if len(self.anchors) == self.history:
            self._drop(self.anchors.pop(0))
        if len(self.anchors) == 1 and not self._is_compared:  # once: less the embedded input, later ones may be less and less alike
            self._is_compared = True
            with self._store.unrecorded():
                before = [self._store.load(feature, tensor) for feature, tensor in zip(self.anchors[0].hidden, hidden)]
                self._alike += [persists(one, other) for one, other in zip(before, hidden)]
        kept = tuple(self._store.put(tensor) for tensor in hidden)
        self.anchors.append(Anchor(time, kept, None if tokens is None else self._store.put(tokens)))
        with self._store.unrecorded():
            self._kept += [tensor.sum(dtype=torch.float32) for tensor in hidden]

    def note_answer(self, hidden: Tensor) -> None:
        """To be told the hidden state that a skipped evaluation was going to answer with, where that may not be finite."""
        self._answered.append(hidden.sum(dtype=torch.float32))

    def is_steady(self) -> bool:
        """Whether what was kept last is of the same tokens, in the same order, as what was kept before."""
        alike = all(bool(each) for each in self._alike)
        self._alike.clear()
        return alike

    def checked(self) -> tuple[bool, bool]:
        """Whether all that was kept, and all that was to be answered since the last check, is finite. What is not kept well is given up."""
        is_kept, is_answered = (all(math.isfinite(total.item()) for total in totals) for totals in (self._kept, self._answered))
        self._kept.clear()
        self._answered.clear()
        if not is_kept:
            self.reset(self.signature)
        return is_kept, is_answered

    def remember_sublayer(self, key: SiteKey, output: Tensor) -> None:
        """Keeps a sublayer's output (rows, L, C) in place of the last one."""
        self._replace(self.sublayers, key, output)
        self._rests[key] = 0

    def can_rest(self, key: SiteKey, every: int) -> bool:
        """Whether what is kept of a sublayer may answer one more full evaluation, if it is computed in one of `every`."""
        return key in self.sublayers and self._rests[key] + 1 < every

    def rest(self, key: SiteKey, like: Tensor) -> Tensor:
        """The sublayer's kept output (rows, L, C) in a full evaluation, in the dtype and on the device of `like`."""
        self._rests[key] += 1
        return self._store.load(self.sublayers[key], like)

    def remember_layer(self, key: SiteKey, value: Tensor) -> None:
        """Keeps the output or the projected input (rows, L, C) of a linear layer in place of the last one."""
        self._replace(self.layers, key, value)

    def reset(self, signature: Hashable = None) -> None:
        """Gives every feature up."""
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
    """cond: who. variant: through which network. occurrence: of both in one evaluation, should it be the same again."""

    cond: Hashable
    variant: Variant = frozenset()
    occurrence: int = 0


class SlotTable:
    """The slots of a run, found by cond and by what the network computes for it.

    The first pass over the conds in an evaluation is the sampler's own. Further ones are other conds, or guidance that looks at the
    same conds through a changed network (SLG, PAG …): those have slots of their own, dropped when an evaluation had none of them.
    """

    def __init__(self, store: FeatureStore, history: int) -> None:
        self._store, self._history = store, history
        self._slots: dict[_Key, Slot] = {}
        self._seen: Counter[tuple] = Counter()  # (cond, variant) in earlier passes of this evaluation
        self._in_pass: set[tuple] = set()  # and in the present one
        self._repeated: set[tuple] = set()  # ever met twice in a pass: its calls cannot be told apart, not even the first of them
        self._evaluation = -1
        self._number = 1

    def __len__(self) -> int:
        return len(self._slots)

    def begin(self, evaluation: int) -> None:
        """A new evaluation, numbered from 0."""
        self._evaluation, self._number = evaluation, 0
        self._seen.clear()
        self._in_pass.clear()
        idle = [key for key, slot in self._slots.items() if slot.in_pass > 1 and slot.last_used < evaluation - 1]
        for key in idle:
            self._slots.pop(key).reset()
        if idle:
            self._store.trim()

    def checked(self) -> tuple[bool, bool]:
        """Whether all slots kept, and answered, nothing but finite values since the last check; see `Slot.checked`."""
        results = [slot.checked() for slot in self._slots.values()]
        return all(kept for kept, _ in results), all(answered for _, answered in results)

    def is_steady(self) -> bool:
        """Of all slots; see `Slot.is_steady`."""
        unsteady = [slot for slot in self._slots.values() if not slot.is_steady()]  # every one is asked, and forgets
        return not unsteady

    def next_pass(self) -> None:
        """Another pass over the conds of this evaluation begins."""
        self._number += 1
        self._seen.update(self._in_pass)
        self._in_pass.clear()

    def find(self, conds: Sequence[Hashable], variant: Variant, signature: Hashable) -> list[Slot] | None:
        """The slots of a call's conds, in order; emptied where the signature changed. None from when one came twice in a pass."""
        wanted = [(cond, variant) for cond in conds]
        if len(set(wanted)) < len(wanted) or self._in_pass.intersection(wanted):
            self._repeated.update(wanted)
        if self._repeated.intersection(wanted):
            return None
        self._in_pass.update(wanted)
        return [self._slot(_Key(cond, variant, self._seen[cond, variant]), signature) for cond in conds]

    def others_of(self, cond: Hashable, variant: Variant) -> list[Variant]:
        """The variants, other than this one, that the evaluation before asked for with this cond."""
        return [key.variant for key, slot in self._slots.items() if key.cond == cond and key.variant != variant
                and slot.last_used == self._evaluation - 1]  # fmt: skip

    @property
    def predicted_bytes(self) -> int:
        return sum(slot.predicted_bytes for slot in self._slots.values())

    def without_inputs(self, history: int) -> None:
        """Gives up every hidden state that was kept with its input; from here on each slot keeps at most `history` of them."""
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

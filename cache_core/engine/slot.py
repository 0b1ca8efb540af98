"""What is kept of each cond during a run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..store import Feature, FeatureStore

SiteKey = tuple[str, int, str]  # stack path, block index, site name


class Anchor(NamedTuple):
    """A computed hidden state, the model's time at which it was computed and, where the predictor uses it, its input.

    With an input, `hidden` is without the embedded input.
    """

    time: float
    hidden: Feature
    input: Feature | None


class Slot:
    """The features of one cond: past hidden states, oldest first, sublayer outputs for conservative evaluations, and what
    calibrated ones need of the linear layers.

    signature: shape, dtype and so on of the calls the features came from; another one starts anew.
    history: hidden states that are kept at most. last_used: index of the evaluation that last asked for it.
    predicted_bytes: what it will hold when its history is full.
    """

    def __init__(self, store: FeatureStore, history: int) -> None:
        self.signature: Hashable = None
        self.last_used = -1
        self.predicted_bytes = 0
        self.anchors: list[Anchor] = []
        self.sublayers: dict[SiteKey, Feature] = {}
        self.linears: dict[SiteKey, Feature] = {}
        self._rests: Counter[SiteKey] = Counter()  # full evaluations that a kept sublayer has answered since it was computed
        self._store = store
        self.history = history

    def remember_hidden(self, time: float, hidden: Tensor, tokens: Tensor | None = None) -> None:
        """Adds an anchor: hidden (rows, L, C) and the input tokens (rows, L, d) where they are used.

        One at the same time is replaced, the oldest is dropped when there are too many.
        """
        if self.anchors and self.anchors[-1].time == time:
            self._drop(self.anchors.pop())
        if len(self.anchors) == self.history:
            self._drop(self.anchors.pop(0))
        self.anchors.append(Anchor(time, self._store.put(hidden), None if tokens is None else self._store.put(tokens)))

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

    def remember_linear(self, key: SiteKey, value: Tensor) -> None:
        """Keeps the output or the projected input (rows, L, C) of a linear layer in place of the last one."""
        self._replace(self.linears, key, value)

    def reset(self, signature: Hashable = None) -> None:
        """Gives every feature up."""
        for anchor in self.anchors:
            self._drop(anchor)
        for features in (self.sublayers, self.linears):
            for feature in features.values():
                self._store.drop(feature)
            features.clear()
        self.anchors.clear()
        self._rests.clear()
        self.signature = signature

    def _replace(self, features: dict[SiteKey, Feature], key: SiteKey, value: Tensor) -> None:
        if key in features:
            self._store.drop(features.pop(key))
        features[key] = self._store.put(value)

    def _drop(self, anchor: Anchor) -> None:
        self._store.drop(anchor.hidden)
        if anchor.input is not None:
            self._store.drop(anchor.input)


class _Key(NamedTuple):
    """cond: who. number: in which pass over the conds. variant: through which network, for passes after the first."""

    cond: Hashable
    number: int = 1
    variant: Hashable = None


class SlotTable:
    """The slots of a run, found by cond.

    The first pass over the conds in an evaluation is the sampler's own. Further ones are guidance that looks at the same
    conds through a changed network (SLG, PAG …): they have slots of their own, dropped when an evaluation had none of them.
    """

    def __init__(self, store: FeatureStore, history: int) -> None:
        self._store, self._history = store, history
        self._slots: dict[_Key, Slot] = {}
        self._seen: set[_Key] = set()
        self._evaluation = -1
        self._number = 1

    def __len__(self) -> int:
        return len(self._slots)

    def begin(self, evaluation: int) -> None:
        """A new evaluation, numbered from 0."""
        self._evaluation, self._number = evaluation, 0
        self._seen.clear()
        idle = [key for key, slot in self._slots.items() if key.number > 1 and slot.last_used < evaluation - 1]
        for key in idle:
            self._slots.pop(key).reset()
        if idle:
            self._store.trim()

    def next_pass(self) -> None:
        """Another pass over the conds of this evaluation begins."""
        self._number += 1

    def find(self, conds: Sequence[Hashable], variant: Hashable, signature: Hashable) -> list[Slot] | None:
        """The slots of a call's conds, in order; emptied where the signature changed. None if one was there before in this pass."""
        keys = [_Key(cond, self._number, variant) if self._number > 1 else _Key(cond) for cond in conds]
        if len(set(keys)) < len(keys) or self._seen.intersection(keys):
            return None
        self._seen.update(keys)
        return [self._slot(key, signature) for key in keys]

    @property
    def predicted_bytes(self) -> int:
        return sum(slot.predicted_bytes for slot in self._slots.values())

    def start_anew(self, history: int) -> None:
        """Gives every feature of every slot up; from here on each keeps at most `history` hidden states."""
        self._history = history
        for slot in self._slots.values():
            slot.reset(slot.signature)
            slot.history = history
        self._store.trim()

    def clear(self) -> None:
        """Forgets every slot and frees the store."""
        self._slots.clear()
        self._store.clear()

    def _slot(self, key: _Key, signature: Hashable) -> Slot:
        slot = self._slots.setdefault(key, Slot(self._store, self._history))
        slot.last_used = self._evaluation
        if slot.signature != signature:
            slot.reset(signature)
            self._store.trim()
        return slot

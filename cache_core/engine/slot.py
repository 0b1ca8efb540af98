"""What is kept of one cond during a run."""

from __future__ import annotations

from collections.abc import Hashable
from typing import NamedTuple

from torch import Tensor

from ..store import Feature, FeatureStore

SiteKey = tuple[str, int, str]  # stack path, block index, site name


class Anchor(NamedTuple):
    """A computed hidden state and the model's time at which it was computed."""

    time: float
    hidden: Feature


class Slot:
    """The features of one cond: past hidden states, oldest first, and sublayer outputs.

    signature: shape, dtype and so on of the calls the features came from; another one starts anew.
    """

    def __init__(self, store: FeatureStore, history: int) -> None:
        self.signature: Hashable = None
        self.anchors: list[Anchor] = []
        self.sublayers: dict[SiteKey, Feature] = {}
        self._store = store
        self._history = history

    def remember_hidden(self, time: float, hidden: Tensor) -> None:
        """Adds an anchor (rows, L, C); one at the same time is replaced, the oldest is dropped when there are too many."""
        if self.anchors and self.anchors[-1].time == time:
            self._store.drop(self.anchors.pop().hidden)
        if len(self.anchors) == self._history:
            self._store.drop(self.anchors.pop(0).hidden)
        self.anchors.append(Anchor(time, self._store.put(hidden)))

    def remember_sublayer(self, key: SiteKey, output: Tensor) -> None:
        if key in self.sublayers:
            self._store.drop(self.sublayers.pop(key))
        self.sublayers[key] = self._store.put(output)

    def reset(self, signature: Hashable = None) -> None:
        """Gives every feature up."""
        for feature in [*(a.hidden for a in self.anchors), *self.sublayers.values()]:
            self._store.drop(feature)
        self.anchors.clear()
        self.sublayers.clear()
        self.signature = signature

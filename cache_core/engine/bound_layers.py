"""The factorised linear layers of every network of a run, with their factors in place."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from ..discovery.places import Known
from ..families.base import ModelFamily
from ..store import memory_ends
from .call import EngineCall
from .linear_sites import FactorisedLayers, Factors, linear_sites


class BoundLayers:
    """By what is known of the calls that they are for: other numbers of tokens bind anew, with the same factors.

    unrecorded: see `store.Unrecorded`.
    """

    def __init__(self, family: ModelFamily, factors: Factors | None, unrecorded: Callable[[], AbstractContextManager[None]]) -> None:
        self._family, self._factors, self._unrecorded = family, factors, unrecorded
        self._bound: dict[Known, FactorisedLayers] = {}

    def of(self, network: nn.Module, known: Known) -> FactorisedLayers:
        """The layers that the network has in this run: since the strategy was made, other nodes may have replaced some."""
        if known not in self._bound:
            assert self._factors is not None, "plans with incremental evaluations are refused without factors"
            self._bound[known] = FactorisedLayers.bind(linear_sites(self._family, known.layer_calls, network), self._factors)
        return self._bound[known]

    def put_in_place(self, call: EngineCall) -> None:
        """Once its first block is reached: factors on the call's device and in its dtype. Raises StoreFullError where there is no room."""
        if call.layers is None:
            return
        ready = [bound for bound in self._bound.values() if bound.place == (call.device, call.dtype)]
        with memory_ends(), self._unrecorded():
            call.layers = call.layers.placed(call.device, call.dtype, ready[0].factors if ready else {})
        self._bound[call.known] = call.layers

    def clear(self) -> None:
        """Frees every tensor."""
        self._bound.clear()

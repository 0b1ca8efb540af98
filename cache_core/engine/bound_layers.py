"""Keeps the factorised linear layers of every network of a run, with their factors on the right device."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager

from torch import nn

from ..discovery.places import Known
from ..families.shared.base import ModelFamily
from ..store import memory_ends
from .call import EngineCall
from .linear_sites import FactorisedLayers, Factors, linear_sites


class BoundLayers:
    """Keeps one `FactorisedLayers` for each `Known`: calls with other numbers of tokens are bound anew, with the same factors.

    Args:
        family: Says which layers are several matrices in one.
        factors: The low-rank factors of the layers, None for a run without incremental evaluations.
        unrecorded: See `store.Unrecorded`.
    """

    def __init__(self, family: ModelFamily, factors: Factors | None, unrecorded: Callable[[], AbstractContextManager[None]]) -> None:
        self._family, self._factors, self._unrecorded = family, factors, unrecorded
        self._bound: dict[Known, FactorisedLayers] = {}

    def of(self, network: nn.Module, known: Known) -> FactorisedLayers:
        """Returns the layers as the network has them now. Other nodes may have replaced some since the strategy was made.

        Raises:
            UnsupportedCallError, ValueError: As `FactorisedLayers.bind` does.
        """
        if known not in self._bound:
            assert self._factors is not None, "plans with incremental evaluations are refused without factors"
            self._bound[known] = FactorisedLayers.bind(linear_sites(self._family, known.layer_calls, network), self._factors)
        return self._bound[known]

    def put_in_place(self, call: EngineCall) -> None:
        """Moves a call's factors to its device and dtype, once its first block is reached.

        Raises:
            StoreFullError: Where there is no room for them.
        """
        if call.layers is None:
            return
        ready = [bound for bound in self._bound.values() if bound.located == (call.device, call.dtype)]
        with memory_ends(), self._unrecorded():
            call.layers = call.layers.placed(call.device, call.dtype, ready[0].factors if ready else {})
        self._bound[call.known] = call.layers

    def clear(self) -> None:
        """Frees every tensor."""
        self._bound.clear()

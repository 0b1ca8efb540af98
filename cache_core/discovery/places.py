"""Remembers for the process what was found out about each network, once for all calls that are alike (`ModelCall.likeness`)."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from .layers import LayerCall, LayerKey
from .place import Place

_MOST = 32  # entries of one network that are remembered; the one found first is forgotten first


@dataclass(eq=False)
class Known:
    """What was found out about calls of one network that are alike. It holds no modules and no tensors.

    Args:
        place: Where the hidden state lies, None where nothing may be cached.
        reason: Why nothing, or only the whole output, may be cached. "" where a place inside the network was proved.
        conds: Number of conds in a call.
        rows: Batch rows of a call, of all conds together.
        macs: Multiply-adds of a full evaluation, all rows together.
        costs: Multiply-adds of evaluations by their key (see `costs.cost_key`), filled in when each is first carried out.
        layer_calls: Calls of the layers inside the place's lists that are given tokens.
        sublayers: Numbers of tokens and channels, per batch row, of everything that conservative evaluations keep.
        is_confirmed: Whether the place was also proved in a later evaluation of a run.
    """

    place: Place | None
    reason: str
    conds: int
    rows: int
    macs: float
    costs: dict[Hashable, float] = field(default_factory=dict)
    layer_calls: Mapping[LayerKey, LayerCall] = field(default_factory=dict)
    sublayers: tuple[tuple[int, int], ...] = ()
    is_confirmed: bool = False

    @property
    def features(self) -> Hashable:
        """Identifies what is kept and where. Features kept elsewhere cannot be combined with it, even if they have the same shape."""
        if self.place is None:
            return None
        kept = tuple((each.out, each.tokens and (each.tokens.start, each.tokens.stop)) for each in self.place.kept)
        return self.place.last, kept, self.kept_of_a_row

    @property
    def kept_of_a_row(self) -> tuple[tuple[int, int], ...]:
        """Numbers of tokens and channels of every kept tensor, per batch row; of all rows where they cannot be told apart."""
        kept = () if self.place is None else self.place.kept
        return tuple((each.rows_and_tokens // (1 if each.rows is None else self.rows), each.shape[-1]) for each in kept)


class CallShape(NamedTuple):
    """What the calls of a run were like.

    Args:
        known: What was found out about one of them.
        slots: Number of slots, of all conds together.
        input_channels: Channels of the model's input where it is kept, else 0.
        layer_bytes: Bytes kept per slot for incremental evaluations.
    """

    known: Known
    slots: int
    input_channels: int = 0
    layer_bytes: int = 0


class Places:
    """Remembers a `Known` for each network and for all of its calls that are alike. A host keeps one `Places` for its process.

    Entries are dropped with their networks. `signature` is `ModelCall.likeness` in every method.

    Args:
        bookkeeping: Prefixes of the attributes that the host keeps on modules for itself, such as where weights are. These change
            without the network remembering anything.
    """

    def __init__(self, bookkeeping: tuple[str, ...] = ()) -> None:
        self.bookkeeping = bookkeeping
        self._known: weakref.WeakKeyDictionary[nn.Module, OrderedDict[Hashable, Known]] = weakref.WeakKeyDictionary()

    def of(self, network: nn.Module, signature: Hashable) -> Known | None:
        own = self._known.get(network)
        return None if own is None else own.get(signature)

    def remember(self, network: nn.Module, signature: Hashable, known: Known) -> None:
        own = self._known.setdefault(network, OrderedDict())
        own[signature] = known
        while len(own) > _MOST:
            own.popitem(last=False)

    def forget(self, network: nn.Module, signature: Hashable) -> None:
        own = self._known.get(network)
        if own is not None:
            own.pop(signature, None)

    def latest(self, network: nn.Module) -> Known | None:
        """Returns what was found out last about a network, to estimate costs. None if nothing was."""
        own = self._known.get(network)
        return next(reversed(own.values())) if own else None

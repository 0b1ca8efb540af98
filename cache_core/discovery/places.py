"""What was found out, remembered for the process: once per network and signature of its calls."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import nn

from .layers import LayerCall, LayerKey
from .place import Place

_MOST = 32  # signatures of one network, before the one found first is forgotten


@dataclass(eq=False)
class Known:
    """Of one network and one signature. It holds no modules and no tensors.

    place: None where nothing may be cached, with the `reason`. conds: in a call. rows: of the batch, of all conds together.
    macs: multiply-adds of a full evaluation, all rows together. costs: of other evaluations, by what they are like; filled in as they
    are first carried out. layer_calls: layers inside the place's stacks that are given tokens. sublayers: tokens and channels, of every
    batch row, of what conservative evaluations keep. is_confirmed: whether the place was proved in a later evaluation of a run too.
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
        """What is kept and where: what was kept elsewhere is no use beside it, be it of the same shape."""
        if self.place is None:
            return None
        kept = tuple((each.out, each.tokens and (each.tokens.start, each.tokens.stop)) for each in self.place.kept)
        return self.place.last, kept, self.kept_of_a_row

    @property
    def kept_of_a_row(self) -> tuple[tuple[int, int], ...]:
        """Tokens and channels of every tensor that is kept, of all rows where they cannot be told apart."""
        kept = () if self.place is None else self.place.kept
        return tuple((each.rows_and_tokens // (1 if each.rows is None else self.rows), each.shape[-1]) for each in kept)


class CallShape(NamedTuple):
    """What a run's calls were like. known: as found out for one of them. slots: of all conds together. input_channels: of the model's
    input, where it was kept. layer_bytes: kept of every slot for incremental evaluations.
    """

    known: Known
    slots: int
    input_channels: int = 0
    layer_bytes: int = 0


class Places:
    """Kept by the host for as long as it runs; entries go with their networks.

    bookkeeping: what the names of attributes begin with that the host keeps on modules for itself, such as where weights are: they
    change without the network remembering anything.
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
        """What was found last; for a forecast of costs."""
        own = self._known.get(network)
        return next(reversed(own.values())) if own else None

"""Describes what was decided for one model call of a run."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from .discovery.places import Known
from .engine import Slot
from .model_call import ModelCall
from .placing import Discovered
from .planning.kinds import Kind


@dataclass(frozen=True)
class Job:
    """A model call, and what was decided for it.

    Args:
        kind: How to carry it out.
        call: What the host says about it.
        compute: Runs the host's model.
        known: What was found out about such calls.
        slots: One slot for each cond, or one for all where the place is joint.
        watched: The full evaluation in which the call's place was found just now. None for all other calls.
    """

    kind: Kind
    call: ModelCall
    compute: Callable[[], Tensor]
    known: Known
    slots: Sequence[Slot]
    watched: Discovered | None = None

    @property
    def in_full(self) -> Job:
        """The same call, to be computed in full from the start."""
        return replace(self, kind=Kind.FULL, watched=None)


def possible_kind(wanted: Kind, slots: Sequence[Slot]) -> Kind:
    """Returns the wanted kind, or full where a slot does not yet hold what that kind needs."""
    needed = {
        Kind.SKIPPED: lambda slot: slot.anchors,
        Kind.CONSERVATIVE: lambda slot: slot.sublayers,
        Kind.INCREMENTAL: lambda slot: slot.layers,
    }
    return wanted if wanted in needed and all(needed[wanted](slot) for slot in slots) else Kind.FULL

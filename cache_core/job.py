"""One model call of a run, with what was decided for it."""

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
    """What to do for a model call.

    Args:
        kind: How to carry it out.
        call: What the host says about it.
        compute: Runs the host's model.
        known: What was found out about such calls.
        slots: Of every cond, or one for all where the place is joint.
        watched: The call as it was computed in full already, while its place was found. None otherwise.
    """

    kind: Kind
    call: ModelCall
    compute: Callable[[], Tensor]
    known: Known
    slots: Sequence[Slot]
    watched: Discovered | None = None

    @property
    def in_full(self) -> Job:
        """The same call computed in full, from the start."""
        return replace(self, kind=Kind.FULL, watched=None)


def possible_kind(wanted: Kind, slots: Sequence[Slot]) -> Kind:
    """The wanted kind, or full where a cond has nothing to go by yet."""
    needed = {
        Kind.SKIPPED: lambda slot: slot.anchors,
        Kind.CONSERVATIVE: lambda slot: slot.sublayers,
        Kind.INCREMENTAL: lambda slot: slot.layers,
    }
    return wanted if wanted in needed and all(needed[wanted](slot) for slot in slots) else Kind.FULL

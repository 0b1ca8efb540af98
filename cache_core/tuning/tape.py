"""Records the model calls of a run, so that another run with the same beginning need not compute them again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from typing import NamedTuple, Protocol

import torch
from einops import rearrange
from torch import Tensor

from ..engine import Slot
from ..engine.linear_sites import LinearSite, linear_sites
from ..job import Job
from ..model_call import ModelCall
from ..run import CacheRun
from ..run_start import RunStart
from ..strategy import Strategy


class Sample(Protocol):
    """Samples one prompt in a given kind of run.

    Args:
        prompt: Number of the prompt, from 0.
        make: Makes the run.

    Returns:
        The final latent (1, …) in system memory.
    """

    def __call__(self, prompt: int, make: Callable[[RunStart], CacheRun]) -> Tensor: ...


class _Kept(NamedTuple):
    """What is kept of one cond in one model call.

    Args:
        hidden: Hidden state, one tensor (rows, L, C) for each tensor that the place keeps.
        input: Input tokens (rows, L, d). None if the predictor does not use them.
    """

    hidden: list[Tensor]
    input: Tensor | None


class _Entry(NamedTuple):
    """One model call on a tape.

    Args:
        conds: Number of conds in its batch.
        output: Answer of the model.
        kept: What is kept of each cond; empty if the call was not computed.
    """

    conds: int
    output: Tensor
    kept: list[_Kept]


@dataclass
class Tape:
    """The recorded model calls of a run, in system memory.

    It takes the memory of one hidden state of each cond for every computed evaluation.

    Args:
        times: The model's time at every evaluation.
        entries: The model calls of every evaluation, in order.
    """

    times: list[float] = field(default_factory=list)
    entries: list[list[_Entry]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype | None:
        """The dtype that the blocks compute in. None before anything was computed."""
        return next((kept.hidden[0].dtype for evaluation in self.entries for entry in evaluation for kept in entry.kept), None)

    def before(self, time: float) -> int:
        """Returns the number of evaluations before the first one at `time` or later in the run."""
        return next((number for number, at in enumerate(self.times) if at <= time), len(self.times))

    def trajectories(self) -> list[tuple[Tensor, Tensor]]:
        """Returns the inputs (n, T, d) and hidden states (n, T, C) of each cond at all n evaluations, with T all its tokens.

        The list is empty if not every evaluation computed equally many conds. A cond without an input is left out.
        """
        rows = [[kept for entry in evaluation for kept in entry.kept] for evaluation in self.entries]
        if not rows or any(len(row) != len(rows[0]) for row in rows):
            return []
        found = []
        for cond in zip(*rows):
            inputs = [kept.input for kept in cond if kept.input is not None]
            if len(inputs) == len(cond):
                hidden = [kept.hidden[0] for kept in cond]
                found.append((rearrange(inputs, "n rows L d -> n (rows L) d"), rearrange(hidden, "n rows L C -> n (rows L) C")))
        return found


class TapedRun(CacheRun):
    """A run that is recorded, and whose first evaluations may be played back from another tape instead of computed.

    Args:
        strategy: Strategy of the run.
        start: What is known of the model and the sampler.
        before: Tape to play back from. Up to `until`, its run must have had the same plan, predictor and noise.
        until: Number of evaluations to play back.
        listen: Makes a context around every computed call, from the call and its linear layers.

    Attributes:
        tape: The tape that the run is recorded on.
    """

    def __init__(
        self,
        strategy: Strategy,
        start: RunStart,
        before: Tape | None = None,
        until: int = 0,
        listen: Callable[[ModelCall, list[LinearSite]], AbstractContextManager[None]] | None = None,
    ) -> None:
        super().__init__(strategy, start)
        self.tape = Tape()
        self._device = start.device
        self._before, self._until, self._listen = before, until, listen

    def _answer(self, job: Job) -> Tensor:
        """Plays the call back where it is on the tape, computes it otherwise, and records it."""
        evaluation = self._evaluation.index
        while len(self.tape.entries) <= evaluation:
            self.tape.entries.append([])
            self.tape.times.append(self._time)
        entry = self._recorded(evaluation, len(job.slots))
        if entry is None:
            before = [slot.anchors[-1] if slot.anchors else None for slot in job.slots]
            result = self._computed(job)
            is_computed = all(slot.anchors and slot.anchors[-1] is not old for slot, old in zip(job.slots, before))
            entry = _Entry(len(job.slots), _copy(result), [_kept(slot) for slot in job.slots] if is_computed else [])
        else:
            result = self._played_back(job, entry)
        self.tape.entries[evaluation].append(entry)
        return result

    def _played_back(self, job: Job, entry: _Entry) -> Tensor:
        """Puts the recorded hidden states into the slots and returns the recorded answer."""
        for slot, kept in zip(job.slots, entry.kept):
            hidden, given = [tensor.to(self._device) for tensor in kept.hidden], kept.input
            slot.remember_hidden(self._time, hidden, None if given is None else given.to(self._device))
        self._evaluation.add_call(job.kind, 0.0, 0.0)  # without it the evaluation would count as answered by another node
        return entry.output.to(self._device)

    def _computed(self, job: Job) -> Tensor:
        """Computes the call inside the context of `listen`."""
        if self._listen is None:
            return super()._answer(job)
        with self._listen(job.call, linear_sites(self.family, job.known.layer_calls, job.call.model)):
            return super()._answer(replace(job, watched=None))  # computed anew: while its place was found, nothing listened

    def _fill_without_input(self, _slots: Sequence[Slot], reason: str) -> None:
        """Raises ValueError: a calibration cannot go on without the model's input."""
        raise ValueError(f"the forecast cannot be calibrated with this model and sampling setup: {reason}")

    def _recorded(self, evaluation: int, conds: int) -> _Entry | None:
        """Returns the entry to play back for the next call of an evaluation, or None.

        A host that is short of memory may now put another number of conds into a call than on the tape. That call is computed.
        """
        number = len(self.tape.entries[evaluation])
        if self._before is None or evaluation >= min(self._until, len(self._before.entries)):
            return None
        entries = self._before.entries[evaluation]
        return entries[number] if number < len(entries) and entries[number].conds == conds else None


def _kept(slot: Slot) -> _Kept:
    """Returns a copy of the newest anchor of a slot."""
    anchor = slot.anchors[-1]
    return _Kept([_copy(feature.data) for feature in anchor.hidden], None if anchor.input is None else _copy(anchor.input.data))


def _copy(tensor: Tensor) -> Tensor:
    """Returns a copy in system memory."""
    return tensor.detach().to("cpu", copy=True)

"""Remembers what a run's model calls gave, so that a run with the same beginning need not compute it again."""

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
    """Samples prompt number `prompt` with the run that `make` gives, and returns the final latent (1, …) in system memory."""

    def __call__(self, prompt: int, make: Callable[[RunStart], CacheRun]) -> Tensor: ...


class _Kept(NamedTuple):
    """A cond's hidden state, (rows, L, C) for each tensor that is kept, and, where the predictor uses it, its input (rows, L, d)."""

    hidden: list[Tensor]
    input: Tensor | None


class _Entry(NamedTuple):
    """One model call, for `conds` conds. kept: one per cond, none where nothing was computed."""

    conds: int
    output: Tensor
    kept: list[_Kept]


@dataclass
class Tape:
    """The model calls of a run, by evaluation and by order within it, in system memory.

    times: the model's time at every evaluation. Memory: for every computed evaluation a hidden state of each cond.
    """

    times: list[float] = field(default_factory=list)
    entries: list[list[_Entry]] = field(default_factory=list)

    @property
    def dtype(self) -> torch.dtype | None:
        """What the blocks compute in; None before anything was computed."""
        return next((kept.hidden[0].dtype for evaluation in self.entries for entry in evaluation for kept in entry.kept), None)

    def before(self, time: float) -> int:
        """How many evaluations come before the first one at `time` or later in the run."""
        return next((number for number, at in enumerate(self.times) if at <= time), len(self.times))

    def trajectories(self) -> list[tuple[Tensor, Tensor]]:
        """Input (n, T, d) and hidden state (n, T, C) at all n evaluations, for every cond that was computed at each of them."""
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
    """A run that is recorded on `tape`; its first `until` evaluations are played back from `before` instead of computed.

    The run on `before` must have had the same plan, predictor and noise that far. listen: a context around every computed call, given
    its linear layers.
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
        for slot, kept in zip(job.slots, entry.kept):
            hidden, given = [tensor.to(self._device) for tensor in kept.hidden], kept.input
            slot.remember_hidden(self._time, hidden, None if given is None else given.to(self._device))
        self._evaluation.add_call(job.kind, 0.0, 0.0)  # so that it does not seem to be answered by another node
        return entry.output.to(self._device)

    def _computed(self, job: Job) -> Tensor:
        if self._listen is None:
            return super()._answer(job)
        with self._listen(job.call, linear_sites(self.family, job.known.layer_calls, job.call.model)):
            return super()._answer(replace(job, watched=None))  # what was watched already went unheard

    def _fill_without_input(self, _slots: Sequence[Slot], reason: str) -> None:
        raise ValueError(f"a forecast of this model cannot be calibrated as it is sampled here: {reason}")

    def _recorded(self, evaluation: int, conds: int) -> _Entry | None:
        """What to play back; nothing where the host, short of memory, now calls for other numbers of conds at a time."""
        number = len(self.tape.entries[evaluation])
        if self._before is None or evaluation >= min(self._until, len(self._before.entries)):
            return None
        entries = self._before.entries[evaluation]
        return entries[number] if number < len(entries) and entries[number].conds == conds else None


def _kept(slot: Slot) -> _Kept:
    anchor = slot.anchors[-1]
    return _Kept([_copy(feature.data) for feature in anchor.hidden], None if anchor.input is None else _copy(anchor.input.data))


def _copy(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True)

"""Measures what a run cost: multiply-adds, milliseconds and bytes of every evaluation, and their sums."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

import torch

from .discovery.places import CallShape
from .planning.kinds import Kind
from .planning.timeline import Timeline

LABELS = MappingProxyType({**{kind.value: kind.label for kind in Kind}, "-": "by another node"})  # of an evaluation's letter


@dataclass
class Evaluation:
    """One evaluation as the sampler asked for it (cond and uncond together).

    Args:
        index: Number of the evaluation in the run, from 0.
        step: The sampler's step that it belongs to.
        sigma: The noise level.
        planned: The kind that the plan has for the step.
        kind: The costliest kind that one of its model calls really was. None where no call reached the model, as another node answered.
        calls: Number of model calls, without those that another node answered.
        skipped: Number of these calls that were skipped.
        macs: Multiply-adds done, embedding and head included.
        full_macs: Multiply-adds of the same evaluation in full.
        ms: Wall time in milliseconds, 0 before the end of the run.
        cache_bytes: Bytes of memory that the cache holds after it, spare memory included.
    """

    index: int
    step: int
    sigma: float
    planned: Kind
    kind: Kind | None = None
    calls: int = 0
    skipped: int = 0
    macs: float = 0.0
    full_macs: float = 0.0
    ms: float = 0.0
    cache_bytes: int = 0

    def add_call(self, kind: Kind, macs: float, full_macs: float) -> None:
        """Enters a model call, with its multiply-adds and those of the same call in full."""
        cheapest_first = (Kind.SKIPPED, Kind.CONSERVATIVE, Kind.INCREMENTAL, Kind.FULL)
        self.kind = kind if self.kind is None else max(self.kind, kind, key=cheapest_first.index)
        self.calls += 1
        self.skipped += kind is Kind.SKIPPED
        self.macs += macs
        self.full_macs += full_macs

    @property
    def letter(self) -> str:
        """The letter of its kind, as in a plan; "-" where another node answered."""
        return self.kind.value if self.kind is not None else "-"

    @property
    def label(self) -> str:
        """Its kind in words, for reports."""
        return LABELS[self.letter]


@dataclass
class RunReport:
    """What a run did, in plain numbers. It holds no tensors.

    Args:
        setting: The strategy in words.
        plan: The plan as text.
        family: Name of the model's family.
        evaluations: All evaluations, in order.
        predicted_bytes: Bytes that the cache was predicted to hold.
        peak_bytes: The most bytes that it really held.
        corrected: Number of full evaluations that corrected the error of the skipped ones before them.
        notices: The notices that the user got during the run.
        is_complete: False after a cancel or an error.
        shape: What the calls were like, None where none was cached.
        place: Where the hidden state was found, or why not, in words.
    """

    setting: str
    plan: str
    family: str
    evaluations: list[Evaluation] = field(default_factory=list)
    predicted_bytes: int = 0
    peak_bytes: int = 0
    corrected: int = 0
    notices: list[str] = field(default_factory=list)
    is_complete: bool = False
    shape: CallShape | None = None
    place: str = ""

    def count(self, kind: Kind) -> int:
        return sum(e.kind is kind for e in self.evaluations)

    @property
    def compute_speedup(self) -> float:
        """Multiply-adds of the same evaluations in full, divided by those done. 1 if none were done."""
        done = sum(e.macs for e in self.evaluations)
        return sum(e.full_macs for e in self.evaluations) / done if done else 1.0

    @property
    def total_ms(self) -> float:
        return sum(e.ms for e in self.evaluations)

    @property
    def time_speedup(self) -> float:
        """Time of all evaluations if each took the median of the full ones, divided by the time taken. 1 if that is not known."""
        full = [e.ms for e in self.evaluations if e.kind is Kind.FULL]
        return statistics.median(full) * len(self.evaluations) / self.total_ms if full and self.total_ms else 1.0


def unsaid(report: RunReport, timeline: Timeline, is_explained: bool) -> list[str]:
    """Returns the notices for the end of a finished run: what the list of evaluations does not show on its own.

    Args:
        timeline: The noise levels of the run.
        is_explained: Whether the user was notified why calls were computed in full.
    """
    levels, texts = timeline.sigmas[:-1], []
    seen = {levels[evaluation.step] for evaluation in report.evaluations if evaluation.calls}
    unseen = sum(level not in seen for level in levels)  # by level, as some samplers have the same one twice
    if unseen:
        texts.append(
            f"the model did not run at {unseen} of {timeline.steps} steps: another node supplied the output, or the sampler skipped them"
        )
    wanted = any(evaluation.planned is not Kind.FULL for evaluation in report.evaluations)
    skipped = any(evaluation.skipped or evaluation.kind not in (Kind.FULL, None) for evaluation in report.evaluations)
    if wanted and not skipped and not is_explained:
        texts.append("nothing could be skipped in this run")
    return texts


class Stopwatch:
    """Measures the time between two marks.

    On CPU and CUDA, setting a mark does not wait for the device. On other devices it does.

    Args:
        device: Device that does the work.
    """

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._must_wait = device.type not in ("cpu", "cuda") and hasattr(torch, "accelerator")

    def mark(self) -> Any:
        """Returns a point in time: of the device's queue on CUDA, else of the clock."""
        if self._must_wait:  # these devices have no timed events, so the queue must run empty
            torch.accelerator.synchronize()
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Returns the milliseconds between two marks. Waits for the device to reach the later one."""
        if not self._is_cuda:
            return (end - start) * 1000
        end.synchronize()
        return start.elapsed_time(end)

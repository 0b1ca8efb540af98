"""What a run cost: multiply-adds, milliseconds and bytes of every evaluation, and their sums."""

from __future__ import annotations

import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import torch

from .discovery.places import CallShape
from .planning.kinds import Kind
from .planning.timeline import Timeline


@dataclass
class Evaluation:
    """One model evaluation as the sampler asked for it (cond and uncond together).

    planned: the kind its step has in the plan. kind: the costliest kind that a model call of it really was; None where no call
    reached the model, as another node answered.
    macs, full_macs: multiply-adds done, and those of the same evaluation in full, embedding and head included.
    skipped: calls that were aggressive. ms: wall time. cache_bytes: kept after it.
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
        cheapest_first = (Kind.SKIPPED, Kind.CONSERVATIVE, Kind.INCREMENTAL, Kind.FULL)
        self.kind = kind if self.kind is None else max(self.kind, kind, key=cheapest_first.index)
        self.calls += 1
        self.skipped += kind is Kind.SKIPPED
        self.macs += macs
        self.full_macs += full_macs

    @property
    def letter(self) -> str:
        """Of its kind, as in a plan; "-" where another node answered."""
        return self.kind.value if self.kind is not None else "-"

    @property
    def label(self) -> str:
        return self.kind.label if self.kind is not None else "elsewhere"


@dataclass
class RunReport:
    """A finished run in plain numbers; it holds no tensors.

    setting: the strategy in words. plan: its text. predicted_bytes, peak_bytes: of the cache.
    corrected: full evaluations that made up for skipped ones. notices: what the user was told during the run.
    is_complete: False after a cancel or an error.
    shape: what its calls were like, None where none was cached. place: where the hidden state was found, or why not, in words.
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
        """Multiply-adds of the same evaluations in full over those done."""
        done = sum(e.macs for e in self.evaluations)
        return sum(e.full_macs for e in self.evaluations) / done if done else 1.0

    @property
    def total_ms(self) -> float:
        return sum(e.ms for e in self.evaluations)

    @property
    def time_speedup(self) -> float:
        """Time that all evaluations would have taken at the median of the full ones, over the time taken."""
        full = [e.ms for e in self.evaluations if e.kind is Kind.FULL]
        return statistics.median(full) * len(self.evaluations) / self.total_ms if full and self.total_ms else 1.0


def unsaid(report: RunReport, timeline: Timeline, is_explained: bool) -> list[str]:
    """At the end of a finished run: what the list of evaluations does not say by itself. is_explained: whether the user was told why calls
    were computed in full.
    """
    levels, texts = timeline.sigmas[:-1], []
    seen = {levels[evaluation.step] for evaluation in report.evaluations if evaluation.calls}
    unseen = sum(level not in seen for level in levels)  # by level, as some schedules have one twice
    if unseen:
        texts.append(f"the model was not called at {unseen} of {timeline.steps} steps: another node answered, or the sampler left them out")
    wanted = any(evaluation.planned is not Kind.FULL for evaluation in report.evaluations)
    skipped = any(evaluation.skipped or evaluation.kind not in (Kind.FULL, None) for evaluation in report.evaluations)
    if wanted and not skipped and not is_explained:
        texts.append("nothing could be skipped in this run")
    return texts


class Stopwatch:
    """Times stretches of work; on CPU and CUDA without making the device wait, with readings collected once, at the end."""

    def __init__(self, device: torch.device) -> None:
        self._is_cuda = device.type == "cuda"
        self._must_wait = device.type not in ("cpu", "cuda") and hasattr(torch, "accelerator")

    def mark(self) -> Any:
        """A point in time of the device's queue (CUDA) or of the clock."""
        if self._must_wait:  # no timed events there: let the queue run empty
            torch.accelerator.synchronize()
        if not self._is_cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, start: Any, end: Any) -> float:
        """Between two marks. Waits for the device to reach the later one."""
        if not self._is_cuda:
            return (end - start) * 1000
        end.synchronize()
        return start.elapsed_time(end)

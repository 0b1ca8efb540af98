"""Sends the page every run of a DuCa Cache node as it goes on, and keeps the last run of each node for a page that asks later."""

from __future__ import annotations

import itertools
import weakref
from collections import OrderedDict
from pathlib import Path
from typing import Any, NamedTuple

from comfy.model_patcher import ModelPatcher
from torch import nn

from ...cache_core import RunReport, RunStart
from ...cache_core.discovery.places import CallShape
from ...cache_core.families import ModelFamily
from ...cache_core.meter import Evaluation
from ..pictures.report_text import report_data
from .notices import running_server

_KEPT = 64  # nodes that are remembered; the one that ran longest ago is forgotten first
_EVENT = "duca_cache.run"


class Known(NamedTuple):
    """What is known of a node's last run, to predict the next one.

    Args:
        family: Family of the model.
        network: The network. The reference is dead once the host has dropped the model.
        sampling: The host's `model_sampling`, which has the noise levels.
        device: Device of the run.
        calibration: The file that was found for the checkpoint, None where there was none.
        shape: What the calls of the run were like, None before a run of this network has ended.
    """

    family: ModelFamily
    network: weakref.ref[nn.Module]
    sampling: Any
    device: Any
    calibration: Path | None
    shape: CallShape | None = None


class LiveRun:
    """One run as the page shows it. It holds no tensors. It sends a message at its start, after each evaluation and at its end.

    Args:
        node: Id of the node.
        number: Number of the run, which the page tells runs apart by.
        name: Name of the strategy.
        plan: Letters of the kinds, one per step.
    """

    def __init__(self, node: str, number: int, name: str, plan: str) -> None:
        self.node, self.number, self.name, self.plan = node, number, name, plan
        self.evaluations: list[dict[str, Any]] = []
        self.report: dict[str, Any] | None = None
        server = running_server()
        self.client = server.client_id if server is not None else None  # the browser tab that queued it
        self._send("start", plan=plan, steps=len(plan), name=name)

    def evaluation(self, evaluation: Evaluation) -> None:
        entry = {"step": evaluation.step, "kind": evaluation.letter}
        self.evaluations.append(entry)
        self._send("evaluation", index=evaluation.index, bytes=evaluation.cache_bytes, **entry)

    def end(self, report: RunReport) -> None:
        self.report = report_data(report)
        self._send("end", complete=report.is_complete, report=self.report)

    def data(self) -> dict[str, Any]:
        """Returns the run as JSON-ready values."""
        return {
            "run": self.number,
            "active": self.report is None,
            "client_id": self.client,
            "plan": self.plan,
            "name": self.name,
            "steps": len(self.plan),
            "evaluations": list(self.evaluations),
            "report": self.report,
        }

    def _send(self, event: str, **more: Any) -> None:
        server = running_server()
        if server is not None:
            server.send_sync(_EVENT, {"event": event, "node": self.node, "run": self.number, **more}, self.client)


class LiveRuns:
    """Keeps the last run of every node, by node id. If two graphs use the same id, the later run counts."""

    def __init__(self) -> None:
        self._runs: OrderedDict[str, LiveRun] = OrderedDict()
        self._known: OrderedDict[str, Known] = OrderedDict()
        self._numbers = itertools.count(1)

    def begin(self, node: str, name: str, plan: str, patcher: ModelPatcher, start: RunStart, calibration: Path | None) -> LiveRun:
        run = LiveRun(node, next(self._numbers), name, plan)
        _put(self._runs, node, run)
        sampling = patcher.get_model_object("model_sampling")
        before = self._known.get(node)
        same = before is not None and before.network() is start.network
        shape = before.shape if before is not None and same else None
        _put(self._known, node, Known(start.family, weakref.ref(start.network), sampling, start.device, calibration, shape))
        return run

    def end(self, run: LiveRun, report: RunReport) -> None:
        run.end(report)
        if report.shape is not None and run.node in self._known:
            self._known[run.node] = self._known[run.node]._replace(shape=report.shape)

    def run_of(self, node: str) -> LiveRun | None:
        return self._runs.get(node)

    def known_of(self, node: str) -> Known | None:
        return self._known.get(node)


def _put(entries: OrderedDict, node: str, entry: Any) -> None:
    entries[node] = entry
    entries.move_to_end(node)
    while len(entries) > _KEPT:
        entries.popitem(last=False)


live_runs = LiveRuns()

"""Describes a finished run, in words and in plain data."""

from __future__ import annotations

from typing import Any

from ...cache_core import Kind, RunReport
from ...cache_core.meter import LABELS

_MIB = 2**20


def report_text(report: RunReport, verbose: bool = False) -> str:
    """Returns a few lines for users. `verbose` adds one per evaluation."""
    evaluations = report.evaluations
    counts = ", ".join(f"{count} {LABELS[letter]}" for letter, count in _counts(report).items())
    lines = [
        f"{report.setting} on {report.family}{'' if report.is_complete else ' (run not finished)'}",
        f"plan         {report.plan}",
        *([f"place        {report.place}"] if report.place else []),
        f"evaluations  {len(evaluations)}: {counts}",
        *([f"corrected    {report.corrected} full evaluations corrected the skipped ones before them"] if report.corrected else []),
        f"compute      {report.compute_speedup:.2f}x less",
        f"time         {report.total_ms / 1000:.2f} s, {report.time_speedup:.2f}x faster than all full",
        f"cache        {report.peak_bytes / _MIB:.1f} MiB (predicted {report.predicted_bytes / _MIB:.1f}), freed",
        *(f"note         {notice}" for notice in report.notices),
    ]
    if verbose:
        lines += [f"{e.index:4d}  step {e.step:3d}  sigma {e.sigma:.4f}  {e.label:15s} {e.ms:8.1f} ms" for e in evaluations]
    return "\n".join(lines)


def report_data(report: RunReport) -> dict[str, Any]:
    """Returns the run as JSON-ready values, for scripts and the page. Kinds are letters as in a plan, "-" where another node answered."""
    return {
        "setting": report.setting,
        "family": report.family,
        "plan": report.plan,
        "place": report.place,
        "complete": report.is_complete,
        "evaluations": [
            {"step": e.step, "sigma": e.sigma, "planned": e.planned.value, "kind": e.letter, "ms": e.ms, "macs": e.macs}
            for e in report.evaluations
        ],
        "counts": _counts(report),
        "corrected": report.corrected,
        "compute_speedup": report.compute_speedup,
        "time_speedup": report.time_speedup,
        "total_ms": report.total_ms,
        "peak_bytes": report.peak_bytes,
        "predicted_bytes": report.predicted_bytes,
        "notices": list(report.notices),
    }


def _counts(report: RunReport) -> dict[str, int]:
    """Returns the number of evaluations of every kind, by its letter, and of those that another node answered, if any."""
    elsewhere = sum(evaluation.kind is None for evaluation in report.evaluations)
    return {kind.value: report.count(kind) for kind in Kind} | ({"-": elsewhere} if elsewhere else {})

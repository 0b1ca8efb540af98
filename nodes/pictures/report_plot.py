"""Draws a finished run as one bar per evaluation, coloured and hatched by kind."""

from __future__ import annotations

import torch
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from ...cache_core import Kind, RunReport
from .figures import image_of

# Okabe and Ito's palette, safe for colour-blind eyes. Hatches, and letters below the bars, say the same without colour.
_STYLE = {
    Kind.FULL: ("#0072B2", ""),
    Kind.INCREMENTAL: ("#009E73", "xx"),
    Kind.CONSERVATIVE: ("#E69F00", "//"),
    Kind.SKIPPED: ("#56B4E9", ".."),
}
_LETTERS = 60  # most letters below the bars; more would overlap


def report_plot(report: RunReport) -> torch.Tensor:
    """Returns the plot as an image (1, H, W, 3) in 0..1."""
    figure = Figure(figsize=(9, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    evaluations = report.evaluations
    for kind, (colour, hatch) in _STYLE.items():
        chosen = [e for e in evaluations if e.kind is kind]
        axes.bar([e.index for e in chosen], [e.ms for e in chosen], color=colour, hatch=hatch, edgecolor="white", width=0.9)
    if len(evaluations) <= _LETTERS:
        axes.set_xticks([e.index for e in evaluations])
        axes.set_xticklabels([e.letter for e in evaluations], family="monospace")
    letters = ", ".join(f"{kind.value} {kind.label}" for kind in Kind)
    axes.set_xlabel(f"evaluation ({letters})" if len(evaluations) <= _LETTERS else "evaluation")
    axes.set_ylabel("milliseconds")
    axes.set_title(
        f"{report.setting}: compute {report.compute_speedup:.2f}x, time {report.time_speedup:.2f}x, "
        f"cache {report.peak_bytes / 2**20:.1f} MiB",
        fontsize=10,
    )
    present = [kind for kind in Kind if report.count(kind)]
    entries = [_legend_entry(kind, report.count(kind)) for kind in present]
    axes.legend(handles=entries, frameon=False, ncols=len(Kind), loc="upper right", bbox_to_anchor=(1, -0.15))
    axes.spines[["top", "right"]].set_visible(False)
    return image_of(figure)


def _legend_entry(kind: Kind, count: int) -> Patch:
    colour, hatch = _STYLE[kind]
    return Patch(facecolor=colour, hatch=hatch, edgecolor="white", label=f"{count} {kind.label}")

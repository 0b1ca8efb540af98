"""Runs the demo: a real ComfyUI server draws emoji with and without the cache; pictures and a table go to demo_out/.

Everything is asked of the server over HTTP, as its page does it; no part of the pack is imported here.
"""

from __future__ import annotations

import copy
import io
import json
import os
import signal
import statistics
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from ..driver.client import ComfyClient, Execution, PromptError
from ..driver.server import ComfyServer, ServerError
from ..environment.host_setup import ROOT, given_comfyui, home_of
from .contact_sheet import Cell, contact_sheet, strip
from .progress import ProgressBar

OUT = ROOT / "demo_out"
WORKFLOW = ROOT / "workflows" / "api" / "duca_demo_flux.json"
PROMPTS = ("red apple", "tiger face", "hamburger", "castle")
STEPS = 28
_HEAD = ("setting", "full", "cons.", "skipped", "time", "compute", "PSNR dB", "SSIM", "cache")


@dataclass(frozen=True)
class Setting:
    """name: for people. file: of its picture. cache: inputs of the DuCa Cache node. steps: of the sampler."""

    name: str
    file: str
    cache: dict[str, Any]
    steps: int = STEPS


UNCACHED = Setting(f"no cache, {STEPS} steps", "uncached", {"mode": "off"})
CACHED = (
    *(Setting(f"auto {speed:g}x", f"auto_{speed:.1f}x", {"mode": "auto", "speedup": speed}) for speed in (2.0, 2.8, 3.5, 4.7)),
    Setting("DuCa paper, N=5", "paper_n5", {"mode": "paper", "cycle_length": 5, "token_share": 0.1}),
)


def fewer_steps(steps: int) -> Setting:
    """What one would do without a cache: as many steps as a cached run has full evaluations."""
    return Setting(f"  no cache, {steps} steps", f"uncached_{steps:02d}_steps", {"mode": "off"}, steps)


@dataclass
class Result:
    """One setting over all prompts. report: of the last run with a cache. plot: reference of its picture."""

    setting: Setting
    seconds: list[float] = field(default_factory=list)
    pictures: list[Image.Image] = field(default_factory=list)
    report: dict[str, Any] = field(default_factory=dict)
    plot: dict[str, str] = field(default_factory=dict)

    @property
    def evaluations(self) -> tuple[int, int, int]:
        """Numbers of full, conservative and skipped ones."""
        counts = self.report.get("counts", {"F": self.setting.steps})  # by the letters that kinds have in plans
        return counts.get("F", 0), counts.get("c", 0), counts.get("a", 0)

    @property
    def compute(self) -> float:
        return self.report.get("compute_speedup", STEPS / self.setting.steps)

    def time(self, reference: Result) -> float:
        """How many times faster than the reference; the median over the prompts, which other load disturbs least."""
        return statistics.median(theirs / own for theirs, own in zip(reference.seconds, self.seconds))

    def psnr(self, reference: Result) -> float:
        pairs = zip(reference.pictures, self.pictures)
        return statistics.fmean(peak_signal_noise_ratio(np.asarray(a), np.asarray(b), data_range=255) for a, b in pairs)

    def ssim(self, reference: Result) -> float:
        pairs = zip(reference.pictures, self.pictures)
        return statistics.fmean(
            structural_similarity(np.asarray(a), np.asarray(b), win_size=7, data_range=255, channel_axis=-1) for a, b in pairs
        )


class Studio:
    """Sends the shipped workflow with a few inputs changed and collects what comes back, by setting."""

    def __init__(self, client: ComfyClient, bar: ProgressBar) -> None:
        self._client, self._bar = client, bar
        self._prompt = json.loads(WORKFLOW.read_text(encoding="utf-8"))
        self._ids = {node["class_type"]: node_id for node_id, node in self._prompt.items()}
        self._results: dict[str, Result] = {}  # by the setting's file

    def draw_all(self) -> tuple[Result, list[tuple[Result, Result]]]:
        """The uncached result and each cached one with its twin of fewer steps. Prompts outermost: load hits all settings alike."""
        for prompt in PROMPTS:
            self._send(prompt, fewer_steps(2))  # loads the model; not reported
            self._draw(prompt, UNCACHED)
            for setting in CACHED:
                self._draw(prompt, setting)
                self._draw(prompt, self._twin(setting))
        results = self._results
        return results[UNCACHED.file], [(results[s.file], results[self._twin(s).file]) for s in CACHED]

    def _twin(self, setting: Setting) -> Setting:
        return fewer_steps(self._results[setting.file].evaluations[0])

    def _draw(self, prompt: str, setting: Setting) -> None:
        result = self._results.setdefault(setting.file, Result(setting))
        if len(result.pictures) > PROMPTS.index(prompt):  # two cached settings with equally many full evaluations share a twin
            self._bar.advance()
            return
        execution = self._send(prompt, setting)
        self._bar.advance()
        result.seconds.append(execution.seconds[self._ids["KSampler"]])
        reference = execution.outputs[self._ids["PreviewImage"]]["images"][0]
        result.pictures.append(Image.open(io.BytesIO(self._client.image(reference))).convert("RGB"))
        shown = execution.outputs.get(self._ids["DuCaCacheReport"], {})
        if "duca_cache_report" in shown:
            result.report, result.plot = shown["duca_cache_report"][0], shown["images"][0]

    def _send(self, prompt: str, setting: Setting) -> Execution:
        sent = copy.deepcopy(self._prompt)
        sent[self._ids["DuCaDemoFlux"]]["inputs"]["prompt"] = prompt
        sent[self._ids["DuCaCache"]]["inputs"].update(setting.cache)
        sent[self._ids["KSampler"]]["inputs"]["steps"] = setting.steps
        doing = f"{prompt}, {setting.name.strip()}"
        self._bar.show(doing)
        return self._client.run(sent, lambda _node, done, steps: self._bar.show(doing, done / steps))


def table(uncached: Result, pairs: list[tuple[Result, Result]]) -> list[tuple[str, ...]]:
    """The rows to print, head first; a fewer-steps twin follows its cached setting."""
    rows: list[tuple[str, ...]] = [_HEAD]
    for result in (uncached, *(result for pair in pairs for result in pair)):
        counts = [str(count) for count in result.evaluations]
        cache = f"{result.report['peak_bytes'] / 2**20:.2f} MiB" if result.report else "-"
        quality = ("-", "-") if result is uncached else (f"{result.psnr(uncached):.1f}", f"{result.ssim(uncached):.3f}")
        rows.append((result.setting.name, *counts, f"{result.time(uncached):.2f}x", f"{result.compute:.2f}x", *quality, cache))
    return rows


def as_text(rows: list[tuple[str, ...]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(_HEAD))]
    aligned = [[row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:]))] for row in rows]
    return "\n".join("  ".join(row) for row in aligned)


def as_markdown(rows: list[tuple[str, ...]]) -> str:
    lines = ["| " + " | ".join(cell.strip() for cell in row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(_HEAD) - 1) + "|", *lines[1:]]) + "\n"


def legend(uncached: Result) -> str:
    return (
        f"{len(PROMPTS)} prompts, 48x48, euler, cfg 2.5; no cache: {statistics.median(uncached.seconds):.2f} s an image. "
        "full, cons., skipped: evaluations of each kind.\ntime: measured on the sampler node. compute: multiply-adds. "
        "Both are times less than no cache. PSNR, SSIM: against no cache.\n"
        "Indented rows: as many steps as the row above has full evaluations, without a cache."
    )


def save(uncached: Result, pairs: list[tuple[Result, Result]], rows: list[tuple[str, ...]], plot: bytes) -> None:
    OUT.mkdir(exist_ok=True)
    for result in (uncached, *(result for pair in pairs for result in pair)):
        strip(result.pictures).save(OUT / f"{result.setting.file}.png")

    def cell(result: Result) -> Cell:
        name = result.setting.name.strip()
        if result is uncached:
            return Cell(result.pictures, name, "the reference")
        return Cell(result.pictures, name, f"PSNR {result.psnr(uncached):.1f} dB, time {result.time(uncached):.2f}x")

    note = (
        "Right, above: with DuCa Cache.\nRight, below: no cache, as many steps\nas the run above computed in full.\n\n"
        "PSNR: against the pictures above.\nTime: so many times faster."
    )
    title = "DuCa Cache on the demo FLUX: " + ", ".join(PROMPTS)
    contact_sheet(title, cell(uncached), note, [(cell(a), cell(b)) for a, b in pairs]).save(OUT / "contact_sheet.png")
    (OUT / "report_plot.png").write_bytes(plot)
    (OUT / "table.md").write_text(f"{as_markdown(rows)}\n{legend(uncached)}\n", encoding="utf-8")


@contextmanager
def running_server(bar: ProgressBar) -> Iterator[ComfyClient]:
    comfyui = os.environ.get("COMFYUI_PATH")
    if not comfyui:
        raise ServerError("COMFYUI_PATH is not set: run this as python3 dev.py demo")
    bar.show("starting ComfyUI")
    with ComfyServer(sys.executable, Path(comfyui), home_of(given_comfyui()) / "base") as server:
        yield ComfyClient(server.url)


def main() -> int:
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))  # so that the server is stopped then too
    bar = ProgressBar(len(PROMPTS) * (1 + 2 * len(CACHED)))
    try:
        with running_server(bar) as client:
            uncached, pairs = Studio(client, bar).draw_all()
            plot = client.image(pairs[1][0].plot)
        rows = table(uncached, pairs)
        save(uncached, pairs, rows, plot)
    except KeyboardInterrupt:
        bar.end("stopped")
        return 130
    except (ServerError, PromptError) as problem:
        bar.end("failed")
        print(problem, file=sys.stderr)
        return 1
    bar.end("done")
    print(f"\n{as_text(rows)}\n\n{legend(uncached)}\n\npictures: {OUT / 'contact_sheet.png'} and, one by one, {OUT}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

"""Compares pictures of several settings with a reference: as a labelled grid, as a map of the differences, and as a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from comfy_api.latest import io, ui

from .metrics import psnr, ssim
from .sheet import COLOURS, Cell, Measures, as_image, drawn_sheet, pixels, with_scale

_SCALE_SHARE = 0.995  # of the pixels of the most different picture that lie within the scale, so that a few do not darken all
_SMALLEST_SCALE = 0.005  # about one step of 8 bits
_HEAD = ("setting", "PSNR dB", "SSIM", "time", "compute")


@dataclass(frozen=True)
class Row:
    """What one setting gave. pictures: (N, H, W, C), colours 0..1. time, compute: so many times less than the reference's, if known."""

    label: str
    pictures: torch.Tensor
    time: float | None = None
    compute: float | None = None


@dataclass(frozen=True)
class Entry:
    """A row whose colours are as they show, with its distance from the reference; None for the reference itself."""

    row: Row
    psnr: float | None = None
    ssim: float | None = None


def score(reference: Row, rows: Sequence[Row]) -> list[Entry]:
    """The reference first. All rows have as many pictures as it has, of its size. Raises ValueError for pictures below 7×7."""
    target = _as_shown(reference)
    entries = [Entry(target)]
    for row in map(_as_shown, rows):
        entries.append(Entry(row, psnr(target.pictures, row.pictures), ssim(target.pictures, row.pictures)))
    return entries


def output(cls: type[io.ComfyNode], entries: Sequence[Entry], lines: Sequence[Sequence[Entry]], *more: Any) -> io.NodeOutput:
    """What a node gives out: grid, difference and table of the entries, then `more`; the first two as a preview as well.

    lines: all entries but the first, as they stand beside it.
    """
    grid, difference, text = draw_grid(entries[0], lines), draw_difference(entries[0], lines), table(entries)
    shown = [*ui.PreviewImage(grid, cls=cls).values, *ui.PreviewImage(difference, cls=cls).values]
    return io.NodeOutput(grid, difference, text, *more, ui={"images": shown, "text": (text,)})


def outputs() -> list[io.Output]:
    """The outputs of a node that gives `output` out, without those of its own."""
    return [
        io.Image.Output(display_name="grid", tooltip="The reference, then each picture over its label, PSNR and SSIM."),
        io.Image.Output(
            display_name="difference",
            tooltip="How far each pixel is from the reference's, in one scale for all: dark is alike, bright is far.",
        ),
        io.String.Output(display_name="table", tooltip="Label, PSNR, SSIM, time and compute of each, as Markdown."),
    ]


def draw_grid(reference: Entry, lines: Sequence[Sequence[Entry]]) -> torch.Tensor:
    """An image (1, H, W, 3): the reference at the left, then the lines, each picture over its label and numbers."""

    def cell(entry: Entry) -> Cell:
        return Cell([pixels(picture.numpy()) for picture in entry.row.pictures], [entry.row.label, *_numbers(entry)])

    own, (first, *others) = cell(reference), [[cell(entry) for entry in line] for line in lines]
    cells: list[list[Cell | None]] = [[own, *first], *([None, *line] for line in others)]
    return as_image(drawn_sheet(cells, Measures(own, max(map(len, cells)))))


def draw_difference(reference: Entry, lines: Sequence[Sequence[Entry]]) -> torch.Tensor:
    """An image (1, H, W, 3): how far each pixel is from the reference's, in one scale for all, which is drawn below."""
    maps = {id(entry): _distances(reference, entry) for line in lines for entry in line}
    scale = _round_up(max(float(np.quantile(distances, _SCALE_SHARE)) for distances in maps.values()))

    def cell(entry: Entry) -> Cell:
        distances = maps[id(entry)]
        pictures = [pixels(COLOURS(one / scale)) for one in distances]
        return Cell(pictures, [entry.row.label, f"mean {distances.mean():.4f}"])

    cells = [[cell(entry) for entry in line] for line in lines]
    measures = Measures(cells[0][0], max(map(len, cells)))
    return as_image(with_scale(drawn_sheet(cells, measures), scale, measures))


def table(entries: Sequence[Entry]) -> str:
    """In Markdown, the reference first; a dash where a number is unknown."""
    rows = [_HEAD, *((_escaped(entry.row.label), *_cells(entry)) for entry in entries)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(_HEAD) - 1) + "|", *lines[1:]])


def in_lines(entries: Sequence[Entry], longest: int) -> list[Sequence[Entry]]:
    """In reading order, and about as many in every line."""
    count = math.ceil(len(entries) / longest)
    length = math.ceil(len(entries) / count)
    return [entries[start : start + length] for start in range(0, len(entries), length)]


def _as_shown(row: Row) -> Row:
    """Colours as a saved file has them: three, 0..1, and black for what is no number."""
    pictures = row.pictures[..., :3].detach().float().cpu().nan_to_num(0.0).clamp(0, 1)
    return Row(row.label, pictures.expand(*pictures.shape[:-1], 3), row.time, row.compute)


def _distances(reference: Entry, entry: Entry) -> np.ndarray:
    """(N, H, W): the mean over the colours of the absolute difference, 0..1."""
    return (entry.row.pictures - reference.row.pictures).abs().mean(-1).numpy()


def _round_up(value: float) -> float:
    """The next of 1, 2, 5, 10, … hundredths or thousandths, so that the scale is easy to read."""
    steps = (_SMALLEST_SCALE, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    return next((step for step in steps if step > value - 1e-6), 1.0)  # what is only rounded in float32 is not above a step


def _cells(entry: Entry) -> tuple[str, str, str, str]:
    """As in the table: PSNR, SSIM, time, compute."""
    quality = "-" if entry.psnr is None else "identical" if math.isinf(entry.psnr) else f"{entry.psnr:.1f}"
    return quality, "-" if entry.ssim is None else f"{entry.ssim:.3f}", _times(entry.row.time), _times(entry.row.compute)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _numbers(entry: Entry) -> Iterator[str]:
    """As in the grid, the lines under a label."""
    quality, likeness, time, compute = _cells(entry)
    if entry.psnr is not None:
        yield f"PSNR {quality}{'' if math.isinf(entry.psnr) else ' dB'}, SSIM {likeness}"
    if entry.row.time is not None or entry.row.compute is not None:
        yield f"time {time}, compute {compute}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace("|", "\\|")

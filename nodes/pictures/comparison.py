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

_SCALE_SHARE = 0.995  # of the pixels of the most different picture lie within the scale, so that a few do not darken all others
_SMALLEST_SCALE = 0.005  # about one step of 8 bits
_HEAD = ("setting", "PSNR dB", "SSIM", "time", "compute")


@dataclass(frozen=True)
class Row:
    """The pictures of one setting.

    Args:
        label: Name of the setting.
        pictures: (N, H, W, C), colours in 0..1.
        time: The reference's time divided by this setting's, None if unknown.
        compute: The same of multiply-adds.
    """

    label: str
    pictures: torch.Tensor
    time: float | None = None
    compute: float | None = None


@dataclass(frozen=True)
class Entry:
    """A row with its distance from the reference.

    Args:
        row: The row, in colours as a saved file has them.
        psnr: PSNR in dB, infinite where both are equal. None for the reference itself.
        ssim: SSIM, 1 where both are equal. None for the reference itself.
    """

    row: Row
    psnr: float | None = None
    ssim: float | None = None


def score(reference: Row, rows: Sequence[Row]) -> list[Entry]:
    """Measures the distance of every row from the reference.

    Args:
        reference: Pictures to compare with.
        rows: As many pictures each, of the same size.

    Returns:
        The entry of the reference, then one for each row.

    Raises:
        ValueError: For pictures below 7×7 pixels.
    """
    target = _as_shown(reference)
    entries = [Entry(target)]
    for row in map(_as_shown, rows):
        entries.append(Entry(row, psnr(target.pictures, row.pictures), ssim(target.pictures, row.pictures)))
    return entries


def output(cls: type[io.ComfyNode], entries: Sequence[Entry], lines: Sequence[Sequence[Entry]], *more: Any) -> io.NodeOutput:
    """Returns the output of a node: grid, difference and table of the entries, then `more`. Grid and difference are its preview, too.

    Args:
        cls: The node.
        entries: The reference, then all others, in the order of the table.
        lines: All entries but the reference, as they are laid out beside it.
    """
    grid, difference, text = draw_grid(entries[0], lines), draw_difference(entries[0], lines), table(entries)
    shown = [*ui.PreviewImage(grid, cls=cls).values, *ui.PreviewImage(difference, cls=cls).values]
    return io.NodeOutput(grid, difference, text, *more, ui={"images": shown, "text": (text,)})


def outputs() -> list[io.Output]:
    """Returns the definitions of the first three outputs in `output`."""
    return [
        io.Image.Output(display_name="grid", tooltip="The reference, then each picture with its label, PSNR and SSIM below."),
        io.Image.Output(
            display_name="difference",
            tooltip="How much each pixel differs from the reference, on one scale for all: dark is the same, bright differs most.",
        ),
        io.String.Output(display_name="table", tooltip="Label, PSNR, SSIM, time and compute of each, in Markdown."),
    ]


def draw_grid(reference: Entry, lines: Sequence[Sequence[Entry]]) -> torch.Tensor:
    """Draws an image (1, H, W, 3): the reference at the left, then the lines, each picture with its label and numbers below."""

    def cell(entry: Entry) -> Cell:
        return Cell([pixels(picture.numpy()) for picture in entry.row.pictures], [entry.row.label, *_numbers(entry)])

    own, (first, *others) = cell(reference), [[cell(entry) for entry in line] for line in lines]
    cells: list[list[Cell | None]] = [[own, *first], *([None, *line] for line in others)]
    return as_image(drawn_sheet(cells, Measures(own, max(map(len, cells)))))


def draw_difference(reference: Entry, lines: Sequence[Sequence[Entry]]) -> torch.Tensor:
    """Draws an image (1, H, W, 3) of how much each pixel differs from the reference, with the one scale for all drawn below."""
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
    """Returns the table in Markdown, the reference first. A dash stands for an unknown number."""
    rows = [_HEAD, *((_escaped(entry.row.label), *_cells(entry)) for entry in entries)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|---" + "|---:" * (len(_HEAD) - 1) + "|", *lines[1:]])


def in_lines(entries: Sequence[Entry], longest: int) -> list[Sequence[Entry]]:
    """Lays entries out in lines of at most `longest`, in reading order, about as many in every line."""
    count = math.ceil(len(entries) / longest)
    length = math.ceil(len(entries) / count)
    return [entries[start : start + length] for start in range(0, len(entries), length)]


def _as_shown(row: Row) -> Row:
    """Returns the row in colours as a saved file has them: three, in 0..1, with 0 for NaN."""
    pictures = row.pictures[..., :3].detach().float().cpu().nan_to_num(0.0).clamp(0, 1)
    return Row(row.label, pictures.expand(*pictures.shape[:-1], 3), row.time, row.compute)


def _distances(reference: Entry, entry: Entry) -> np.ndarray:
    """Returns the absolute difference of every pixel (N, H, W), as the mean over the colours, in 0..1."""
    return (entry.row.pictures - reference.row.pictures).abs().mean(-1).numpy()


def _round_up(value: float) -> float:
    """Rounds up to 0.005, 0.01, 0.02, 0.05 and so on, so that the scale is easy to read."""
    steps = (_SMALLEST_SCALE, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
    return next((step for step in steps if step > value - 1e-6), 1.0)  # a rounding error of float32 does not lift a value above a step


def _cells(entry: Entry) -> tuple[str, str, str, str]:
    """Returns PSNR, SSIM, time and compute as the table shows them."""
    quality = "-" if entry.psnr is None else "identical" if math.isinf(entry.psnr) else f"{entry.psnr:.1f}"
    return quality, "-" if entry.ssim is None else f"{entry.ssim:.3f}", _times(entry.row.time), _times(entry.row.compute)


def _times(ratio: float | None) -> str:
    return "-" if ratio is None else f"{ratio:.2f}x"


def _numbers(entry: Entry) -> Iterator[str]:
    """Yields the lines below a label in the grid."""
    quality, likeness, time, compute = _cells(entry)
    if entry.psnr is not None:
        yield f"PSNR {quality}{'' if math.isinf(entry.psnr) else ' dB'}, SSIM {likeness}"
    if entry.row.time is not None or entry.row.compute is not None:
        yield f"time {time}, compute {compute}"


def _escaped(label: str) -> str:
    return label.replace("\\", "\\\\").replace("|", "\\|")

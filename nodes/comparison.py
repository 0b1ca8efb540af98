"""Sets pictures of several settings beside a reference: a labelled grid, a map of the differences, a table."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from comfy_api.latest import io, ui
from PIL import Image, ImageDraw, ImageFont

from .picture_metrics import psnr, ssim

_NARROWEST, _WIDEST = 230, 8192  # pixels: a cell, so that its text has room, and a sheet, for memory
_SMALLEST_TEXT = 13
_PAPER, _INK, _FAINT = "#ffffff", "#1a1a1a", "#5c5c5c"
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # there wherever matplotlib is; also Cyrillic and Greek
_COLOURS = matplotlib.colormaps["inferno"]  # rises evenly in lightness, so colour-blind eyes and grey prints read it alike
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


def draw_grid(reference: Entry, lines: Sequence[Sequence[Entry]]) -> torch.Tensor:
    """An image (1, H, W, 3): the reference at the left, then the lines, each picture over its label and numbers."""

    def cell(entry: Entry) -> _Cell:
        return _Cell([_pixels(picture.numpy()) for picture in entry.row.pictures], [entry.row.label, *_numbers(entry)])

    own, (first, *others) = cell(reference), [[cell(entry) for entry in line] for line in lines]
    cells: list[list[_Cell | None]] = [[own, *first], *([None, *line] for line in others)]
    return _image(_sheet(cells, _Measures(own, max(map(len, cells)))))


def draw_difference(reference: Entry, lines: Sequence[Sequence[Entry]]) -> torch.Tensor:
    """An image (1, H, W, 3): how far each pixel is from the reference's, in one scale for all, which is drawn below."""
    maps = {id(entry): _distances(reference, entry) for line in lines for entry in line}
    scale = _round_up(max(float(np.quantile(distances, _SCALE_SHARE)) for distances in maps.values()))

    def cell(entry: Entry) -> _Cell:
        distances = maps[id(entry)]
        pictures = [_pixels(_COLOURS(one / scale)) for one in distances]
        return _Cell(pictures, [entry.row.label, f"mean {distances.mean():.4f}"])

    cells = [[cell(entry) for entry in line] for line in lines]
    measures = _Measures(cells[0][0], max(map(len, cells)))
    return _image(_with_scale(_sheet(cells, measures), scale, measures))


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


# -- numbers -------------------------------------------------------------------------------------------


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


# -- drawing -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    """A setting's pictures, drawn as one block, and the lines of text below."""

    pictures: Sequence[Image.Image]
    texts: Sequence[str]


class _Measures:
    """Of a sheet with as many columns, in pixels. Pictures are enlarged or reduced by a whole factor, and all else follows their size."""

    def __init__(self, cell: _Cell, columns: int) -> None:
        count, (width, height) = len(cell.pictures), cell.pictures[0].size
        self.across = math.ceil(math.sqrt(count))
        self._enlarged = math.ceil(_NARROWEST / (width * self.across))
        self._reduced = math.ceil(width * self.across * self._enlarged * columns / _WIDEST)
        self.size = tuple(math.ceil(side * self._enlarged / self._reduced) for side in (width, height))
        self.font = ImageFont.truetype(_FONT, max(_SMALLEST_TEXT, self.size[0] * self.across // 19))
        self.gap, self.line = round(self.font.size), round(1.3 * self.font.size)
        self.hairline = max(1, self.gap // 5)  # between the pictures of one setting
        self.block = tuple(side * n + self.hairline * (n - 1) for side, n in zip(self.size, (self.across, math.ceil(count / self.across))))

    def resized(self, picture: Image.Image) -> Image.Image:
        if self._reduced > 1:
            return picture.reduce(self._reduced)
        return picture.resize((self.size[0], self.size[1]), Image.Resampling.NEAREST)


def _sheet(lines: Sequence[Sequence[_Cell | None]], measures: _Measures) -> Image.Image:
    """The cells in lines, None left blank."""
    gap, block = measures.gap, measures.block
    texts = max(len(cell.texts) for line in lines for cell in line if cell is not None)
    step = (block[0] + gap, block[1] + measures.line * texts + gap)
    sheet = Image.new("RGB", (gap + step[0] * max(map(len, lines)), gap + step[1] * len(lines)), _PAPER)
    for down, line in enumerate(lines):
        for right, cell in enumerate(line):
            if cell is not None:
                _place(sheet, cell, (gap + right * step[0], gap + down * step[1]), measures)
    return sheet


def _place(sheet: Image.Image, cell: _Cell, corner: tuple[int, int], measures: _Measures) -> None:
    left, top = corner
    draw, (width, height) = ImageDraw.Draw(sheet), (side + measures.hairline for side in measures.size)
    for i, picture in enumerate(cell.pictures):
        sheet.paste(measures.resized(picture), (left + i % measures.across * width, top + i // measures.across * height))
    for i, text in enumerate(cell.texts):
        place = (left, top + measures.block[1] + measures.gap // 5 + i * measures.line)
        draw.text(place, _shortened(text, measures.font, measures.block[0]), _FAINT if i else _INK, measures.font)


def _with_scale(sheet: Image.Image, scale: float, measures: _Measures) -> Image.Image:
    """The sheet with its colours explained below."""
    font, line, left = measures.font, measures.line, measures.gap
    width = min(sheet.width - 2 * left, 40 * left)
    whole = Image.new("RGB", (sheet.width, sheet.height + 4 * line), _PAPER)
    whole.paste(sheet)
    draw, top = ImageDraw.Draw(whole), sheet.height + line
    draw.text((left, sheet.height - left // 4), _shortened("difference of colours, 0 to 1", font, width), _INK, font)
    whole.paste(_pixels(_COLOURS(np.linspace(0, 1, width)[None])).resize((width, line)), (left, top))
    for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        value = f"{'≥ ' if share == 1 and scale < 1 else ''}{scale * share:g}"
        draw.text((left + share * width, top + line + left // 5), value, _FAINT, font, anchor=anchor)
    return whole


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """With an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    kept = next((end for end in range(len(text) - 1, 0, -1) if font.getlength(text[:end] + "…") <= width), 0)
    return text[:kept].rstrip() + "…"


def _pixels(colours: np.ndarray) -> Image.Image:
    """From (H, W, 3 or more) in 0..1, of which only three are taken."""
    return Image.fromarray((colours[..., :3] * 255).round().astype(np.uint8))


def _image(sheet: Image.Image) -> torch.Tensor:
    """The host's image (1, H, W, 3) in 0..1."""
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]

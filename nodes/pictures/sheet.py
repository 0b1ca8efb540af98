"""Lays pictures out in lines and columns with text below, and draws a scale of colours."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_NARROWEST, _WIDEST = 230, 8192  # pixels: least width of a cell, for its text, and largest of a sheet, for memory
_SMALLEST_TEXT = 13
_PAPER, _INK, _FAINT = "#ffffff", "#1a1a1a", "#5c5c5c"
COLOURS = matplotlib.colormaps["inferno"]  # its lightness rises evenly, so that it also reads well for colour-blind eyes and in grey
_FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"  # comes with matplotlib; has Cyrillic and Greek letters, too


@dataclass(frozen=True)
class Cell:
    """The pictures of a setting, which are drawn as one block, and the lines of text below."""

    pictures: Sequence[Image.Image]
    texts: Sequence[str]


class Measures:
    """The measures of a sheet, in pixels. Pictures are enlarged or reduced by whole factors, and all else follows their size.

    Args:
        cell: One of the sheet's cells; all have as many pictures, of the same size.
        columns: Number of columns.

    Attributes:
        across: Number of pictures side by side in a cell.
        size: Width and height of a picture as it is drawn.
        font: Font of the texts.
        gap: Space between cells.
        line: Height of a line of text.
        hairline: Space between the pictures of one cell.
        block: Width and height of all pictures of a cell together.
    """

    def __init__(self, cell: Cell, columns: int) -> None:
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


def drawn_sheet(lines: Sequence[Sequence[Cell | None]], measures: Measures) -> Image.Image:
    """Draws a sheet. A cell that is None stays blank."""
    gap, block = measures.gap, measures.block
    texts = max(len(cell.texts) for line in lines for cell in line if cell is not None)
    step = (block[0] + gap, block[1] + measures.line * texts + gap)
    sheet = Image.new("RGB", (gap + step[0] * max(map(len, lines)), gap + step[1] * len(lines)), _PAPER)
    for down, line in enumerate(lines):
        for right, cell in enumerate(line):
            if cell is not None:
                _place(sheet, cell, (gap + right * step[0], gap + down * step[1]), measures)
    return sheet


def _place(sheet: Image.Image, cell: Cell, corner: tuple[int, int], measures: Measures) -> None:
    left, top = corner
    draw, (width, height) = ImageDraw.Draw(sheet), (side + measures.hairline for side in measures.size)
    for i, picture in enumerate(cell.pictures):
        sheet.paste(measures.resized(picture), (left + i % measures.across * width, top + i // measures.across * height))
    for i, text in enumerate(cell.texts):
        place = (left, top + measures.block[1] + measures.gap // 5 + i * measures.line)
        draw.text(place, _shortened(text, measures.font, measures.block[0]), _FAINT if i else _INK, measures.font)


def with_scale(sheet: Image.Image, scale: float, measures: Measures) -> Image.Image:
    """Returns the sheet with a scale of its colours below, from 0 to `scale`."""
    font, line, left = measures.font, measures.line, measures.gap
    width = min(sheet.width - 2 * left, 40 * left)
    whole = Image.new("RGB", (sheet.width, sheet.height + 4 * line), _PAPER)
    whole.paste(sheet)
    draw, top = ImageDraw.Draw(whole), sheet.height + line
    draw.text((left, sheet.height - left // 4), _shortened("difference of colours, 0 to 1", font, width), _INK, font)
    whole.paste(pixels(COLOURS(np.linspace(0, 1, width)[None])).resize((width, line)), (left, top))
    for share, anchor in ((0.0, "la"), (0.5, "ma"), (1.0, "ra")):
        value = f"{'≥ ' if share == 1 and scale < 1 else ''}{scale * share:g}"
        draw.text((left + share * width, top + line + left // 5), value, _FAINT, font, anchor=anchor)
    return whole


def _shortened(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Returns the text, cut short with an ellipsis where it is wider than `width` pixels."""
    if font.getlength(text) <= width:
        return text
    kept = next((end for end in range(len(text) - 1, 0, -1) if font.getlength(text[:end] + "…") <= width), 0)
    return text[:kept].rstrip() + "…"


def pixels(colours: np.ndarray) -> Image.Image:
    """Returns the picture of colours (H, W, 3 or more) in 0..1. Only the first three channels are used."""
    return Image.fromarray((colours[..., :3] * 255).round().astype(np.uint8))


def as_image(sheet: Image.Image) -> torch.Tensor:
    """Returns the sheet as an image of the host (1, H, W, 3) in 0..1."""
    return torch.from_numpy(np.asarray(sheet).astype(np.float32) / 255)[None]

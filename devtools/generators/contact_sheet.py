"""Arranges the demo's pictures: every cached setting stands above the same number of evaluations without a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

_SCALE, _GAP, _CAPTION = 4, 14, 44
_PAPER, _INK, _FAINT = "#ffffff", "#1a1a1a", "#5c5c5c"


@dataclass(frozen=True)
class Cell:
    """One setting to show.

    Args:
        pictures: One for each prompt.
        title: The first line below them.
        detail: The second line, in grey.
    """

    pictures: Sequence[Image.Image]
    title: str
    detail: str


def contact_sheet(title: str, first: Cell, note: str, pairs: Sequence[tuple[Cell, Cell]]) -> Image.Image:
    """Draws `first` at the left with `note` below it, then a column for each pair: its first cell above its second."""
    block = _mosaic(first.pictures)
    width, height = block.width + _GAP, block.height + _CAPTION + _GAP
    sheet = Image.new("RGB", (_GAP + width * (1 + len(pairs)), _GAP + _CAPTION + 2 * height), _PAPER)
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, _INK, _font(20))
    top = _GAP + _CAPTION
    _place(sheet, first, (_GAP, top))
    draw.multiline_text((_GAP, top + height), note, _FAINT, _font(15), spacing=6)
    for column, (above, below) in enumerate(pairs, start=1):
        _place(sheet, above, (_GAP + column * width, top))
        _place(sheet, below, (_GAP + column * width, top + height))
    return sheet


def strip(pictures: Sequence[Image.Image]) -> Image.Image:
    """Returns the pictures in one row, each pixel enlarged."""
    return _tile(pictures, columns=len(pictures))


def _mosaic(pictures: Sequence[Image.Image]) -> Image.Image:
    return _tile(pictures, columns=2 if len(pictures) > 1 else 1)


def _tile(pictures: Sequence[Image.Image], columns: int) -> Image.Image:
    width, height = (side * _SCALE for side in pictures[0].size)
    rows = -(-len(pictures) // columns)
    tiled = Image.new("RGB", (width * columns, height * rows), _PAPER)
    for index, picture in enumerate(pictures):
        enlarged = picture.resize((width, height), Image.Resampling.NEAREST)
        tiled.paste(enlarged, (width * (index % columns), height * (index // columns)))
    return tiled


def _place(sheet: Image.Image, cell: Cell, corner: tuple[int, int]) -> None:
    block = _mosaic(cell.pictures)
    sheet.paste(block, corner)
    draw = ImageDraw.Draw(sheet)
    draw.text((corner[0], corner[1] + block.height + 4), cell.title, _INK, _font(16))
    draw.text((corner[0], corner[1] + block.height + 24), cell.detail, _FAINT, _font(14))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)

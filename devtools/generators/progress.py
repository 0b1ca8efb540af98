"""Shows the demo's progress in one line."""

from __future__ import annotations

import sys
from typing import TextIO

_WIDTH = 30


class ProgressBar:
    """Redraws one line on a terminal. Elsewhere, as in a log, it writes a line only when the text changes."""

    def __init__(self, total: int, stream: TextIO = sys.stdout) -> None:
        self._total, self._done, self._stream = total, 0, stream
        self._is_terminal, self._doing, self._drawn = stream.isatty(), "", 0

    def show(self, doing: str, share: float = 0.0) -> None:
        """Shows what is running and `share`, how much of it is done (0..1)."""
        part = min(1.0, (self._done + share) / self._total)
        if self._is_terminal:
            filled = round(part * _WIDTH)
            self._draw(f"[{'#' * filled}{'.' * (_WIDTH - filled)}] {part:4.0%}  {doing}")
        elif doing != self._doing:
            print(f"{part:4.0%}  {doing}", file=self._stream, flush=True)
        self._doing = doing

    def advance(self) -> None:
        self._done += 1

    def end(self, how: str) -> None:
        """Writes the last line. After that the terminal is free for other text."""
        if self._is_terminal:
            self._draw("")
            print(f"\r{how}", file=self._stream, flush=True)
        else:
            print(how, file=self._stream, flush=True)

    def _draw(self, line: str) -> None:
        print(f"\r{line:{self._drawn}}", end="", file=self._stream, flush=True)
        self._drawn = len(line)

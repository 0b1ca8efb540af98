"""Helpers that all benchmarks use: they load the host into this process and write tables into documents."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from devtools.driver.inprocess import load_comfyui, load_pack

DOCUMENT = ROOT / "docs" / "benchmarks.md"


def start() -> None:
    """Loads ComfyUI and the pack. Must be called before `import torch` and the like."""
    load_comfyui()
    load_pack()
    sys.path.append(str(ROOT / "tests"))


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Returns a Markdown table whose first column is aligned left and whose others are aligned right."""
    lines = [list(header), ["---", *["---:"] * (len(header) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def machine() -> str:
    """Returns the torch version, processor cores and Python version in words."""
    import torch

    return f"torch {torch.__version__} on {os.cpu_count()} CPU cores ({platform.machine()}), Python {platform.python_version()}"


def published(name: str, path: Path = DOCUMENT) -> str:
    """Returns the text between the markers for `name` in the document at `path`."""
    return path.read_text(encoding="utf-8").split(f"<!-- {name}: begin -->")[1].split(f"<!-- {name}: end -->")[0].strip()


def publish(name: str, text: str, path: Path = DOCUMENT) -> None:
    """Prints a result and writes it between the markers for `name` in the document at `path`."""
    print(text)
    begin, end = f"<!-- {name}: begin -->", f"<!-- {name}: end -->"
    document = path.read_text(encoding="utf-8")
    head, tail = document.split(begin)[0], document.split(end)[1]
    path.write_text(f"{head}{begin}\n{text}\n{end}{tail}", encoding="utf-8")

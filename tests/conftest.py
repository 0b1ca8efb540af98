"""Marks each test with its room and prints, at the end, why tests were skipped and on which host they ran.

A room is a folder, and its name is the mark: core needs no ComfyUI, host has it in the process, server and browser start one in
another process, and families samples small models of its classes. Only the rooms' own conftest.py load ComfyUI.
"""

from __future__ import annotations

import os
import runpy
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).resolve().parent
sys.path.insert(0, str(TESTS.parent))
from devtools.environment import host_setup

try:
    import hypothesis
except ImportError:
    pass  # the tests that need it are skipped
else:
    hypothesis.settings.register_profile("no deadline", deadline=None)  # a busy machine is no defect
    hypothesis.settings.load_profile("no deadline")


_IN_THIS_RUN = pytest.StashKey[set[str]]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    config.stash[_IN_THIS_RUN] = set()
    for item in items:
        room = item.path.relative_to(TESTS).parts[0]
        item.add_marker(room)
        config.stash[_IN_THIS_RUN].add(room)


@pytest.hookimpl(trylast=True)  # below everything else
def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    for reason, count in Counter(report.longrepr[2] for report in terminalreporter.stats.get("skipped", [])).most_common():
        terminalreporter.write_line(f"{count} {reason.replace('Skipped', 'skipped', 1)}")
    host = "without ComfyUI" if config.stash.get(_IN_THIS_RUN, set()) <= {"core"} else f"on {comfyui()}"
    terminalreporter.write_line(f"{host}, torch {torch.__version__}")


def comfyui() -> str:
    version = runpy.run_path(str(Path(os.environ["COMFYUI_PATH"]) / "comfyui_version.py"))["__version__"]
    return f"ComfyUI {version} ({'the pinned source' if host_setup.given_comfyui() is None else 'COMFYUI_PATH'})"

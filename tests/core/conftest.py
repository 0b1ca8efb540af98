"""Loads the part of the pack that needs no ComfyUI, as `comfyui_duca.cache_core`. Needs torch, numpy, safetensors and pytest alone."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from devtools.driver.inprocess import PACK, load_pack

HERE = Path(__file__).resolve().parent
load_pack()

from comfyui_duca.cache_core.calibration.sidecar import write
from helpers.sidecars import sidecar


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session: pytest.Session) -> None:
    """Fails a session of this room alone if anything of ComfyUI was imported."""
    of_comfyui = sorted(name for name in sys.modules if name.startswith("comfy") and name.partition(".")[0] != PACK)
    if of_comfyui and all(item.path.is_relative_to(HERE) for item in session.items):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED
        sys.stderr.write(f"\ntests/core imported {', '.join(of_comfyui[:5])}\n")


@pytest.fixture
def file(tmp_path) -> Path:
    """Returns the path of a sidecar that was just written."""
    path = tmp_path / "emoji.safetensors"
    write(path, sidecar())
    return path

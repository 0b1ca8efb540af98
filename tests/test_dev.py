"""dev.py tells people what to do when the set-up cannot work."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

from devtools import host_setup

ROOT = Path(__file__).resolve().parents[1]


def dev(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(ROOT / "dev.py"), *arguments], capture_output=True, text=True, env=os.environ | environment)


def test_without_a_command_it_explains_itself():
    done = dev()
    assert done.returncode == 0
    assert all(command in done.stdout for command in ("demo", "test", "bench", "lint", "host", "COMFYUI_PATH"))
    assert dev("dance").returncode == 2


def test_a_wrong_comfyui_path_is_named(tmp_path):
    done = dev("host", COMFYUI_PATH=str(tmp_path))
    assert done.returncode == 1
    assert str(tmp_path) in done.stderr and "not a ComfyUI folder" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_old_python_is_told_apart(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 9, 1, "final", 0))
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "dev.py"), run_name="__main__")
    assert "needs Python 3.10 or newer" in str(stopped.value)


def test_a_failed_download_says_what_to_do(tmp_path):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\necho 'ERROR: no network' >&2\nexit 1\n")
    broken.chmod(0o755)
    with pytest.raises(host_setup.SetupError) as failed:
        host_setup._fetch_comfyui(host_setup.Host(broken, tmp_path / "comfyui", tmp_path / "base"))
    assert "Check the network and try again" in str(failed.value) and "no network" in str(failed.value)
    assert not (tmp_path / "comfyui").exists()


def test_the_pack_is_linked_into_custom_nodes(tmp_path):
    for _ in range(2):  # a second call finds it there
        host_setup.link_pack(tmp_path)
        assert (tmp_path / "custom_nodes" / host_setup.PACK_NAME).resolve() == ROOT

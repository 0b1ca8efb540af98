"""This room needs torch, numpy, safetensors and pytest, and nothing of ComfyUI."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]

_REFUSING = """
import sys

class Refusing:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in REFUSED:
            raise ModuleNotFoundError(f"{name} is refused here", name=name)

sys.meta_path.insert(0, Refusing())
import pytest
failed = pytest.main([*sys.argv[1:], "-p", "no:cacheprovider"])
assert not [name for name in sys.modules if name.startswith("comfy") and name.split(".")[0] != "comfyui_duca"]
sys.exit(failed)
"""
_REFUSED = (
    "folder_paths", "nodes", "server", "execution", "app", "node_helpers",  # ComfyUI's own
    "aiohttp", "hypothesis", "matplotlib", "PIL", "playwright", "scipy", "skimage", "torchaudio", "torchvision", "transformers",
)  # fmt: skip


def test_every_file_of_this_room_is_imported_without_it():
    """All are collected where ComfyUI and what only it or other rooms need cannot be imported; what a test imports itself is in the end
    looked for by conftest.py, in a session of this room alone.
    """
    environment = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-c", f"REFUSED = {_REFUSED}\n{_REFUSING}", "--collect-only", str(TESTS / "core")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {f"core/{path.relative_to(TESTS / 'core').as_posix()}" for path in (TESTS / "core").rglob("test_*.py")}
    collected = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert files - collected == {"core/test_properties.py"}, "which hypothesis is for"

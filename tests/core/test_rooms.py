"""The core room needs only torch, numpy, safetensors, einops and pytest, and no test file imports another."""

from __future__ import annotations

import os
import re
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
_OF_A_TEST_FILE = re.compile(r"^[ \t]*(?:from[ \t]+[\w.]*\btest_\w+[ \t]+import|import[ \t][^\n]*\btest_)", re.MULTILINE)


def test_core_is_collected_without_comfyui():
    """Collects the room without ComfyUI and without what only other rooms need.

    This shows imports at collection. Those of running tests are checked by conftest.py, at the end of a session of this room alone.
    """
    environment = {name: value for name, value in os.environ.items() if name != "COMFYUI_PATH"}
    environment["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
    command = [sys.executable, "-c", f"REFUSED = {_REFUSED}\n{_REFUSING}", "--collect-only", str(TESTS / "core")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=TESTS.parent)
    assert done.returncode == 0, done.stdout + done.stderr
    files = {f"core/{path.relative_to(TESTS / 'core').as_posix()}" for path in (TESTS / "core").rglob("test_*.py")}
    collected = {line.split(":")[0] for line in done.stdout.splitlines()}
    assert files - collected == {"core/test_properties.py"}, "which hypothesis is for"


def test_no_test_file_imports_another():
    """What several test files use is in a helper module. All file names differ, as tests and helpers are imported by name alone."""
    files = sorted(TESTS.rglob("*.py"))
    for path in files:
        assert not _OF_A_TEST_FILE.search(path.read_text(encoding="utf-8")), path
    names = [path.name for path in files if path.name not in ("conftest.py", "__init__.py")]
    assert len(names) == len(set(names))

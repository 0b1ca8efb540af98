"""cache_core imports no host, keeps no global state, and its parts import one way."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "cache_core").rglob("*.py"))

_BLOCKED = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {"comfy", "comfy_api", "comfy_extras", "folder_paths", "server", "nodes", "execution"}:
            raise AssertionError(f"cache_core imported {name}")
sys.meta_path.insert(0, Block())
sys.path.insert(0, sys.argv[1])
import importlib, pathlib
for file in pathlib.Path(sys.argv[1], "cache_core").rglob("*.py"):
    parts = file.relative_to(sys.argv[1]).with_suffix("").parts
    importlib.import_module(".".join(parts).removesuffix(".__init__"))
print("imported")
"""


def test_the_core_imports_without_a_host():
    done = subprocess.run([sys.executable, "-c", _BLOCKED, str(ROOT)], capture_output=True, text=True)
    assert done.stdout.strip() == "imported", done.stderr


def _imports(path: Path) -> set[str]:
    """Parts of the core that a file imports, by their first name below cache_core."""
    package = path.relative_to(ROOT / "cache_core").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module or "").split("."))
            names = [target] if node.module else [(*base, alias.name) for alias in node.names]
            found |= {name[0] for name in names if name and name[0]}
    return found


_SHARED = {"kinds"}  # small frozen dataclasses that everyone may use
_ALLOWED = {
    "kinds": set(),
    "checks": set(),
    "timeline": set(),
    "store": set(),
    "meter": {"discovery", "timeline"},
    "schedule_text": set(),
    "policies": {"policies", "schedule_text"},
    "predictors": {"predictors"},
    "families": {"families", "refusals"},
    "refusals": set(),
    "overrides": set(),
    "discovery": {"discovery", "overrides", "refusals", "store"},
    "engine": {"discovery", "engine", "families", "overrides", "predictors", "refusals", "store"},
    "calibration": {"calibration", "engine", "families", "overrides", "policies", "predictors"},
    "opening": {"discovery", "families", "store", "timeline"},
    "schedule": {"calibration", "checks", "opening", "policies", "schedule_text"},
    "strategy": {"calibration", "checks", "engine", "families", "opening", "policies", "predictors", "schedule", "store"},
    "corrector": {"kinds", "meter", "timeline"},
    "model_call": set(),
    "networks": {"families", "model_call", "strategy"},
    "costs": {"discovery", "engine", "schedule", "store", "strategy"},
    "accounts": {"costs", "discovery", "engine", "meter", "model_call", "overrides", "store", "strategy"},
    "placing": {"discovery", "engine", "families", "model_call", "overrides", "refusals", "store"},
    "run": {
        "accounts", "corrector", "discovery", "engine", "families", "meter", "model_call", "networks", "placing", "refusals", "store",
        "strategy", "timeline",
    },
    "tuning": {
        "calibration", "discovery", "engine", "model_call", "opening", "placing", "policies", "predictors", "run", "strategy", "tuning",
    },
}  # fmt: skip


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py" or f.parent.name != "cache_core"], ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    part = path.relative_to(ROOT / "cache_core").parts[0].removesuffix(".py")
    assert _imports(path) <= _ALLOWED[part] | _SHARED


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_module_holds_mutable_state(path):
    """Module level: constants, tuples and read-only tables; no list, dict or set but __all__, no `global`."""
    tree = ast.parse(path.read_text())
    assert not [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    for node in tree.body:
        if isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None:
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(t, ast.Name) and t.id == "__all__" for t in targets):
                continue
            assert not isinstance(node.value, (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)), ast.unparse(node)

"""cache_core imports no host and keeps no global state, and its parts import in one direction."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
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


def _part(names: tuple[str, ...]) -> str:
    """Returns the part of the core that a dotted name belongs to: its first name, or the first two in `planning`."""
    return ".".join(names[:2]) if names[0] == "planning" else names[0]


def _imports(path: Path) -> set[str]:
    """Returns the parts of the core that a file imports."""
    package = path.relative_to(ROOT / "cache_core").parts[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = package[: len(package) - node.level + 1]
            target = (*base, *(node.module or "").split("."))
            names = [target] if node.module else [(*base, alias.name) for alias in node.names]
            found |= {_part(name) for name in names if name and name[0]}
    return found


_SHARED = {"planning.kinds", "planning.plan"}  # small frozen dataclasses that every part may use
_ALLOWED = {
    "blocks": set(),
    "checks": set(),
    "refusals": set(),
    "overrides": set(),
    "store": set(),
    "model_call": set(),
    "planning.__init__": set(),
    "planning.kinds": set(),
    "planning.text": set(),
    "planning.plan": {"planning.text"},
    "planning.timeline": set(),
    "planning.search": set(),
    "planning.policies": {"planning.policies", "planning.text"},
    "planning.schedule": {"calibration", "checks", "planning.policies", "planning.text", "run_start"},
    "predictors": {"predictors"},
    "families": {"blocks", "families", "refusals"},
    "discovery": {"blocks", "discovery", "overrides", "refusals", "store"},
    "engine": {"blocks", "discovery", "engine", "families", "overrides", "predictors", "refusals", "store"},
    "calibration": {"calibration", "engine", "families", "overrides", "planning.policies", "planning.search", "predictors"},
    "run_start": {"discovery", "families", "planning.timeline", "store"},
    "meter": {"discovery", "planning.timeline"},
    "costs": {"discovery", "engine", "store", "strategy"},  # the last for the types alone
    "strategy": {"calibration", "checks", "costs", "engine", "planning.policies", "planning.schedule", "predictors", "run_start", "store"},
    "corrector": {"meter", "planning.timeline"},
    "networks": {"families", "model_call", "strategy"},
    "accounts": {"costs", "discovery", "engine", "meter", "model_call", "overrides", "store", "strategy"},
    "placing": {"discovery", "engine", "families", "model_call", "overrides", "refusals", "store"},
    "job": {"discovery", "engine", "model_call", "placing"},
    "run": {
        "accounts", "corrector", "discovery", "engine", "job", "meter", "model_call", "networks", "placing", "refusals", "run_start",
        "store", "strategy",
    },
    "tuning": {
        "calibration", "discovery", "engine", "job", "model_call", "placing", "planning.policies", "predictors", "run", "run_start",
        "strategy", "tuning",
    },
}  # fmt: skip


@pytest.mark.parametrize("path", [f for f in FILES if f.name != "__init__.py" or f.parent.name != "cache_core"], ids=lambda p: p.stem)
def test_imports_go_one_way(path):
    part = _part(path.relative_to(ROOT / "cache_core").with_suffix("").parts)
    assert _imports(path) <= _ALLOWED[part] | _SHARED


_LITERALS = (ast.List, ast.Dict, ast.Set, ast.ListComp, ast.DictComp, ast.SetComp)
_CALLS = {
    "dict", "list", "set", "bytearray", "defaultdict", "deque", "Counter", "OrderedDict", "ChainMap", "UserDict", "UserList",
    "SimpleNamespace", "WeakKeyDictionary", "WeakValueDictionary", "WeakSet", "local", "ContextVar", "count", "cycle",
}  # fmt: skip
_CACHES = {"cache", "lru_cache", "singledispatch"}  # decorators of functions whose results outlive a run


def _statements(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    """Yields the statements that run when a module is imported, also those in classes and conditions."""
    for node in body:
        yield node
        for part in ("body", "orelse", "finalbody"):
            if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                yield from _statements(getattr(node, part, []))
        for handler in getattr(node, "handlers", []):
            yield from _statements(handler.body)


def _name(node: ast.expr) -> str:
    """Returns the last name of `a.b.c` and of `a.b.c(...)`."""
    node = node.func if isinstance(node, ast.Call) else node
    return node.attr if isinstance(node, ast.Attribute) else node.id if isinstance(node, ast.Name) else ""


def _is_mutable(value: ast.expr) -> bool:
    """Returns whether the value can be changed or holds something that can. Arguments of calls do not count (tuple([1]))."""
    if isinstance(value, ast.Call):
        return _name(value) in _CALLS
    if isinstance(value, ast.BinOp) and isinstance(value.op, ast.BitOr):
        return _is_mutable(value.left)  # a frozenset | a set is a frozenset
    if isinstance(value, (ast.Tuple, ast.IfExp, ast.BoolOp, ast.BinOp, ast.NamedExpr, ast.Starred)):
        return any(_is_mutable(part) for part in ast.iter_child_nodes(value) if isinstance(part, ast.expr))
    return isinstance(value, _LITERALS)


def mutable_state(source: str) -> list[str]:
    """Returns the lines of a module that make state which outlives a call. `__all__`, a list by convention, does not count."""
    tree = ast.parse(source)
    found: list[ast.AST] = [node for node in ast.walk(tree) if isinstance(node, ast.Global)]
    found += [f for f in ast.walk(tree) for kept in getattr(f, "decorator_list", []) if _name(kept) in _CACHES]
    for node in _statements(tree.body):
        if isinstance(node, ast.AugAssign) or (isinstance(node, (ast.Assign, ast.AnnAssign)) and node.value is not None):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if not any(_name(target) == "__all__" for target in targets) and _is_mutable(node.value):
                found.append(node)
    return [ast.unparse(node).splitlines()[0] for node in found]


@pytest.mark.parametrize("path", FILES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_no_module_holds_mutable_state(path):
    """Modules and classes have constants, tuples and read-only tables: no list, dict or set but `__all__`, no `global`, and no caches."""
    assert not mutable_state(path.read_text())


@pytest.mark.parametrize(
    "line",
    [
        "kept = []", "kept = {}", "kept: dict = {}", "kept = dict()", "kept = list()", "kept = set()", "kept = dict(a=1)",
        "kept = defaultdict(list)", "kept = collections.deque()", "kept: Counter[str] = Counter()", "kept = weakref.WeakKeyDictionary()",
        "kept = [0] * 3", "kept = {1} | {2}", "kept = (1, [])", "kept = [i for i in range(3)]", "first = second = {}", "kept += [1]",
        "kept = {} if x else None", "if x:\n    kept = {}", "try:\n    pass\nexcept OSError:\n    kept = []", "class A:\n    kept = []",
        "def f():\n    global kept", "@cache\ndef f():\n    pass", "@functools.lru_cache(maxsize=3)\ndef f():\n    pass",
    ],
)  # fmt: skip
def test_mutable_state_is_seen(line):
    assert mutable_state(line)


@pytest.mark.parametrize(
    "line",
    [
        "__all__ = ['a']",
        "__all__ += ['a']", "names = ('a', 'b')", "names = frozenset({'a'}) | {'b'}", "Alias = Callable[[int], list]", "names = tuple([1])",
        "table = MappingProxyType({'a': 1})", "def f():\n    kept = []", "class A:\n    kept: list = field(default_factory=list)",
    ],
)  # fmt: skip
def test_constants_are_no_state(line):
    assert not mutable_state(line)

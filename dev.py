#!/usr/bin/env python3
"""Runs everything that a developer does. Needs the standard library only, and Python 3.10 or newer.

  python3 dev.py demo     starts a ComfyUI server, runs the shipped demo workflow, writes pictures and a table to demo_out/
  python3 dev.py test     runs all tests; `test core` runs one room of them (core, host, server, browser, families)
  python3 dev.py bench    runs the benchmarks (names as arguments; without one, all)
  python3 dev.py lint     runs ruff and mypy
  python3 dev.py host     only sets up: virtual environment, pinned dependencies, ComfyUI, the pack linked into it

Everything is kept in .dev/ and is set up by the first call. COMFYUI_PATH=/path/to/ComfyUI uses that source instead of
the pinned one and does not write to it. Arguments after the command are passed on (dev.py test -k flux).
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent

if sys.version_info < (3, 10):  # noqa: UP036 - an old python3 is what people start it with
    sys.exit(f"dev.py needs Python 3.10 or newer; this is {sys.version.split()[0]}. Run it with a newer python3.")

sys.path.insert(0, str(ROOT))
from devtools.environment.host_setup import Host, SetupError, ensure_host  # noqa: E402

ROOMS = ("core", "host", "server", "browser", "families")  # folders of tests, by what they need; core needs no ComfyUI
_LONG = ("behaviours_identity", "icc_runs", "not_finite", "recording", "tuning")
SECOND_HALF = ["tests/server", "tests/browser", *(f"tests/host/test_{name}.py" for name in _LONG)]  # with core as long as all others
BENCHMARKS = ["overhead", "quality", "host_caches", "calibrated", "transfer", "sidecar_size", "discovery", "families"]


def main(arguments: list[str]) -> int:
    command, rest = (arguments[0], arguments[1:]) if arguments else ("", [])
    if command not in COMMANDS:
        print(__doc__)
        return 0 if command in ("", "-h", "--help") else 2
    try:
        host = ensure_host()
    except SetupError as problem:
        print(f"set-up failed: {problem}", file=sys.stderr)
        return 1
    return COMMANDS[command](host, rest)


def run(host: Host, *command: str) -> int:
    """Runs the environment's Python and returns its exit status. Ctrl-C reaches the child process, which cleans up."""
    child = subprocess.Popen([str(host.python), *command], cwd=ROOT, env=os.environ | host.environment)
    while True:
        try:
            return child.wait()
        except KeyboardInterrupt:
            continue


def test(host: Host, rest: list[str]) -> int:
    if not rest:
        return test_in_two(host)
    rest = [f"tests/{a}" if a in ROOMS else a for a in rest]
    chosen = [a for a in rest if (ROOT / a.split("::")[0]).exists()]
    return run(host, "-m", "pytest", *(() if chosen else ("tests",)), *rest)


def test_in_two(host: Host) -> int:
    """Runs all tests in two halves at the same time, as most tests use one processor. Returns the larger exit status.

    Each half gets half of the processors. The output of the half that runs in the background is printed last. The core room has a
    process of its own, which shows that it imports no ComfyUI.
    """
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // 2)))
    with tempfile.TemporaryFile() as output:
        command = [str(host.python), "-m", "pytest", "tests", *(f"--ignore={path}" for path in ("tests/core", *SECOND_HALF))]
        beside = subprocess.Popen(command, cwd=ROOT, env=os.environ | host.environment, stdout=output, stderr=subprocess.STDOUT)
        status = max(run(host, "-m", "pytest", "tests/core"), run(host, "-m", "pytest", *SECOND_HALF), beside.wait())
        output.seek(0)
        print(output.read().decode(errors="replace"))
    return status


def demo(host: Host, rest: list[str]) -> int:
    return run(host, "-m", "devtools.generators.demo", *rest)


def bench(host: Host, rest: list[str]) -> int:
    names = [a for a in rest if not a.startswith("-")] or BENCHMARKS
    options = [a for a in rest if a.startswith("-")]
    return max(run(host, str(ROOT / "bench" / f"{name}.py"), *options) for name in names)


def lint(host: Host, rest: list[str]) -> int:
    return run(host, "-m", "ruff", "check", ".") or run(host, "-m", "ruff", "format", "--check", ".") or run(host, "-m", "mypy")


def only_set_up(host: Host, rest: list[str]) -> int:
    print(f"ComfyUI   {host.comfyui}\nPython    {host.python}\nnodes     {host.base / 'custom_nodes'}")
    return 0


COMMANDS = {"demo": demo, "test": test, "bench": bench, "lint": lint, "host": only_set_up}

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))

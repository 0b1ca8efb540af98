"""Runs pieces of code in new processes that start quickly: they are forked from one that has done the imports."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

_SERVE = """
import json as _json, os as _os, sys as _sys, traceback as _traceback
for _line in _sys.stdin:
    _asked = _json.loads(_line)
    if not (_pid := _os.fork()):
        _out = _os.open(_asked["output"], _os.O_WRONLY | _os.O_CREAT)
        for _stream in (1, 2):
            _os.dup2(_out, _stream)
        _status = 0
        try:
            globals().update(_asked["names"])
            exec(_asked["body"], globals())
        except BaseException:
            _traceback.print_exc()
            _status = 1
        _sys.stdout.flush(); _sys.stderr.flush()
        _os._exit(_status)
    print(_os.waitstatus_to_exitcode(_os.waitpid(_pid, 0)[1]), flush=True)
"""


class Forked:
    """A process that runs pieces of code, each in a fork.

    Forks are made from a process without threads; the tests' own process may have some.

    Args:
        setting: Code that runs once, before every piece.
    """

    def __init__(self, setting: str) -> None:
        command = [sys.executable, "-u", "-c", setting + _SERVE]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def run(self, body: str, **names: str) -> str:
        """Runs a piece of code and returns what it prints. `names` are strings that the code can use as variables."""
        assert self._process.stdin is not None and self._process.stdout is not None
        with tempfile.TemporaryDirectory() as folder:
            output = Path(folder) / "output"
            self._process.stdin.write(json.dumps({"body": body, "names": names, "output": str(output)}) + "\n")
            self._process.stdin.flush()
            status = self._process.stdout.readline().strip()
            said = output.read_text() if output.exists() else ""
        assert status == "0", f"ended with {status or 'nothing'}: {said}"
        return said

    def close(self) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()

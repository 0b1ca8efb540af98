"""Runs a headless ComfyUI server for as long as a `with` block lasts. Needs the standard library only."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

_GRACE_SECONDS = 10.0
_POLL_SECONDS = 0.1
_LOG_LINES_SHOWN = 25


class ServerError(Exception):
    """Raised with the reason why the server did not start and the end of its log."""


class ComfyServer:
    """A ComfyUI process on a free loopback port: `with ComfyServer(python, comfyui, base) as server: server.url`.

    The process inherits this one's environment variables. Previews go to a folder of its own, which is deleted at the end, because
    ComfyUI empties a shared one whenever it starts.

    Args:
        python: The interpreter that has ComfyUI's packages.
        comfyui: ComfyUI's source.
        base: Its --base-directory.
        log: Where its output goes; server.log in the parent folder of `base` by default.
        timeout: Seconds to wait until it answers.
        arguments: Further arguments for main.py.
    """

    def __init__(
        self,
        python: Path | str,
        comfyui: Path | str,
        base: Path | str,
        log: Path | str | None = None,
        timeout: float = 180.0,
        arguments: Sequence[str] = (),
    ) -> None:
        self.python, self.comfyui, self.base = Path(python), Path(comfyui), Path(base)
        self.log = Path(log) if log is not None else self.base.parent / "server.log"
        self.url = ""
        self._timeout, self._arguments = timeout, tuple(arguments)
        self._process: subprocess.Popen[bytes] | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def __enter__(self) -> ComfyServer:
        try:
            self._start()
        except BaseException:  # Ctrl-C included: nothing else would stop the process
            self._stop()
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._stop()

    def log_tail(self, lines: int = _LOG_LINES_SHOWN) -> str:
        """Returns the end of the log, to show in an error."""
        try:
            return "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-lines:])
        except OSError:
            return ""

    def _start(self) -> None:
        port = _free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.log.parent.mkdir(parents=True, exist_ok=True)
        self._temporary = tempfile.TemporaryDirectory(prefix="comfyui-", ignore_cleanup_errors=True)
        command = [*self._command(port), "--temp-directory", self._temporary.name]
        with self.log.open("wb") as log:
            self._process = subprocess.Popen(command, cwd=self.base, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
        self._wait_until_ready(self._process)

    def _wait_until_ready(self, process: subprocess.Popen[bytes]) -> None:
        deadline = time.monotonic() + self._timeout
        while not self._answers():
            if process.poll() is not None:
                raise ServerError(f"ComfyUI ended while starting (exit code {process.returncode}). {self._log_text()}")
            if time.monotonic() > deadline:
                raise ServerError(f"ComfyUI did not answer within {self._timeout:g} s. {self._log_text()}")
            time.sleep(_POLL_SECONDS)

    def _command(self, port: int) -> list[str]:
        network = ["--listen", "127.0.0.1", "--port", str(port), "--disable-auto-launch"]
        # Without a database of its own the server would write one into the source folder, which may not be ours.
        files = ["--base-directory", str(self.base), "--database-url", f"sqlite:///{self.base / 'comfyui.db'}"]
        compute = ["--cpu", "--use-pytorch-cross-attention"]
        return [str(self.python), str(self.comfyui / "main.py"), *compute, *network, *files, *self._arguments]

    def _answers(self) -> bool:
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # a configured proxy cannot reach loopback
        try:
            with direct.open(f"{self.url}/system_stats", timeout=5) as answer:
                return answer.status == 200
        except (urllib.error.URLError, OSError):
            return False

    def _log_text(self) -> str:
        return f"The end of its log, {self.log}:\n{self.log_tail()}"

    def _stop(self) -> None:
        """Asks the server to end and waits. Ends it by force if that takes too long, or if Ctrl-C is pressed again."""
        process, temporary = self._process, self._temporary
        try:
            if process is not None:
                process.terminate()
                process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            pass
        finally:
            if process is not None and process.poll() is None:
                process.kill()
                process.wait()
            if temporary is not None:
                temporary.cleanup()
            self._process = self._temporary = None


def _free_port() -> int:
    """Returns a port that is free now. If another program takes it before the server does, starting fails and says so."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])

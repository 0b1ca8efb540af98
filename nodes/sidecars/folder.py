"""Knows where calibration sidecars are: in models/duca_calibration, or beside a checkpoint as <any name>.duca.safetensors."""

from __future__ import annotations

import os
import re
from contextlib import suppress
from pathlib import Path

import folder_paths

from ...cache_core.calibration.fingerprint import Fingerprint
from ...cache_core.calibration.sidecar import Sidecar, SidecarError, write

FOLDER = "duca_calibration"
ENDING = ".duca.safetensors"
_SUFFIX = ".safetensors"
_BESIDE = ("diffusion_models", "checkpoints")  # folders of checkpoints; "unet" is the host's older name of the first
_WEIGHTS = re.compile(r"\.(safetensors|sft|gguf|ckpt|pt|pth|bin)$", re.IGNORECASE)
_LONGEST = 120  # bytes of a name: with all that is added, also for the temporary file, it stays below the 255 of most disks


def register() -> None:
    """Adds the folder to the host's list, after those that the user configured. Creates nothing, and may be called again."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # from extra_model_paths.yaml there are no extensions, which means all files to the host
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, _SUFFIX})


register()


def names() -> list[str]:
    """Returns the files in the folders for sidecars, as a combo shows them. They are not read, so some may be no sidecars."""
    return [name for name in _listed(FOLDER) if name.lower().endswith(_SUFFIX)]


def path_of(name: str) -> Path:
    """Returns the file of one of `names`. Raises FileNotFoundError if it is gone. No name leads out of the folders."""
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def default_path(model_name: str, fingerprint: Fingerprint) -> Path:
    """Returns where the sidecar of a model goes: in the first folder, named after the model and its weights.

    Only the last part of `model_name` is used, without the ending of a checkpoint. Everything but letters, digits, - and _ is replaced,
    dots too, so that the file stays in the folder and never has a name that Windows reserves ("nul.x").
    """
    name = _WEIGHTS.sub("", re.split(r"[/\\]", model_name)[-1])
    safe = re.sub(r"[^\w-]+", "_", name).strip("_-").encode()[:_LONGEST].decode(errors="ignore")
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{safe or 'model'}-{fingerprint.short}{ENDING}"


def state() -> tuple:
    """Returns a value that changes when a file in the folders for sidecars comes, goes or is written again."""
    found = []
    for path in candidates():
        with suppress(OSError):
            found.append((str(path), *state_of(path)))
    return tuple(sorted(found))


def state_of(path: Path) -> tuple[int, int]:
    """Returns a value that changes when the file is written again. Raises OSError if it is not there."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def make_folder() -> None:
    """Makes the folder that `save` writes to. Call it before the work, as it raises SidecarError if `save` could not write there."""
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SidecarError(folder, f"the folder cannot be made: {error.strerror or error}", "allow it, or configure another") from error
    if not os.access(folder, os.W_OK):
        raise SidecarError(folder, "the folder cannot be written to", "allow writing to it, or configure another")


def save(sidecar: Sidecar) -> Path:
    """Writes a sidecar to the model's `default_path` and returns the path. Replaces a file that is there. Raises SidecarError."""
    make_folder()
    path = default_path(sidecar.about.model_name, sidecar.fingerprint)
    write(path, sidecar)
    return path


def candidates() -> list[Path]:
    """Returns every file that should be a sidecar, once."""
    named = [(FOLDER, name) for name in names()]
    named += [(folder, name) for folder in _BESIDE for name in _listed(folder) if name.lower().endswith(ENDING)]
    paths = (folder_paths.get_full_path(folder, name) for folder, name in named)
    return list(dict.fromkeys(Path(path) for path in paths if path is not None))


def _listed(folder: str) -> list[str]:
    """Returns the names of the files in a folder of the host and below. It never raises: the page would lose all nodes."""
    if folder != FOLDER:  # these can be large, and the host remembers their lists until a folder changes
        with suppress(OSError):  # raised if a folder that the host has listed is gone
            return folder_paths.get_filename_list(folder)
    with suppress(OSError):
        return folder_paths.get_filename_list_(folder)[0]
    return []

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
_BESIDE = ("diffusion_models", "checkpoints")  # where checkpoints are; "unet" is the host's older name of the first
_WEIGHTS = re.compile(r"\.(safetensors|sft|gguf|ckpt|pt|pth|bin)$", re.IGNORECASE)
_LONGEST = 120  # bytes of a name: with what is added, the writer's temporary file too, it stays below the 255 of most disks


def register() -> None:
    """Makes the folder known to the host, after those the user configured; creates nothing. May be called again."""
    folder_paths.add_model_folder_path(FOLDER, str(Path(folder_paths.models_dir) / FOLDER))
    paths, extensions = folder_paths.folder_names_and_paths[FOLDER]
    # extra_model_paths.yaml leaves no extensions, which to the host means every file
    folder_paths.folder_names_and_paths[FOLDER] = (paths, {*extensions, _SUFFIX})


register()


def names() -> list[str]:
    """The files in the folders for sidecars, as a combo shows them. Not looked into, so not all need be sidecars."""
    return [name for name in _listed(FOLDER) if name.lower().endswith(_SUFFIX)]


def path_of(name: str) -> Path:
    """The file of one of `names`. Raises FileNotFoundError when it is gone; no name leads out of the folders."""
    return Path(folder_paths.get_full_path_or_raise(FOLDER, name))


def default_path(model_name: str, fingerprint: Fingerprint) -> Path:
    """Where the sidecar of a model goes: in the first folder, named after the model and its weights.

    Of `model_name` only the last part counts, without a checkpoint's ending. Everything but letters, digits, - and _ is
    replaced, dots too: so the name stays in the folder, and none is one that Windows reserves ("nul.x").
    """
    name = _WEIGHTS.sub("", re.split(r"[/\\]", model_name)[-1])
    safe = re.sub(r"[^\w-]+", "_", name).strip("_-").encode()[:_LONGEST].decode(errors="ignore")
    return Path(folder_paths.get_folder_paths(FOLDER)[0]) / f"{safe or 'model'}-{fingerprint.short}{ENDING}"


def state() -> tuple:
    """Changes when a file in the folders for sidecars comes, goes or is written anew."""
    found = []
    for path in candidates():
        with suppress(OSError):
            found.append((str(path), *state_of(path)))
    return tuple(sorted(found))


def state_of(path: Path) -> tuple[int, int]:
    """Changes when the file is written anew. Raises OSError where it is not there."""
    stat = path.stat()
    return stat.st_mtime_ns, stat.st_size


def make_folder() -> None:
    """Makes the folder that `save` writes to. Raises SidecarError where it cannot be made or written to: better before minutes of work."""
    folder = Path(folder_paths.get_folder_paths(FOLDER)[0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise SidecarError(folder, f"the folder cannot be made: {error.strerror or error}", "allow it, or configure another") from error
    if not os.access(folder, os.W_OK):
        raise SidecarError(folder, "the folder cannot be written to", "allow writing to it, or configure another")


def save(sidecar: Sidecar) -> Path:
    """Writes to the model's `default_path`, replacing what is there, and returns it. Raises SidecarError when it cannot."""
    make_folder()
    path = default_path(sidecar.about.model_name, sidecar.fingerprint)
    write(path, sidecar)
    return path


def candidates() -> list[Path]:
    """Every file that should be a sidecar, once."""
    named = [(FOLDER, name) for name in names()]
    named += [(folder, name) for folder in _BESIDE for name in _listed(folder) if name.lower().endswith(ENDING)]
    paths = (folder_paths.get_full_path(folder, name) for folder, name in named)
    return list(dict.fromkeys(Path(path) for path in paths if path is not None))


def _listed(folder: str) -> list[str]:
    """Names of the files in a folder of the host and below. Never raises: a combo that does takes all nodes off the page."""
    if folder != FOLDER:  # these can be large, and the host keeps their lists until a folder changes
        with suppress(OSError):  # which it raises once a folder it has seen is gone
            return folder_paths.get_filename_list(folder)
    with suppress(OSError):
        return folder_paths.get_filename_list_(folder)[0]
    return []

"""Writes and reads sidecars: safetensors files that each keep the calibration of one checkpoint.

Tensors are named `<section>.<name>`. A file has one or both sections, and always `fingerprint.values` (m, 64) float32.

| section | name | shape | dtype | |
| --- | --- | --- | --- | --- |
| forecast | gram | (n, n) | float64 | inner products of the hidden states (minus the embedded input) at two evaluations, mean per token |
| | uu | (n, n, d, d) | float32 | the same of the channels of two inputs |
| | uz | (n, n, d, r) | float16 or float32 | the same of the channels of inputs and of hidden states, in the basis |
| | basis | (C, r) | float32 | orthonormal directions of hidden channels |
| | sensitivity | (n,) | float64 | squared move of the final latent per squared error of a forecast |
| | step_times | (k,) | float64 | the model's time (0..1) at every step of the calibrated runs |
| | plans | (p, k) | float32 | the plan that did best for each budget: 0 skipped, 1 full, 2 incremental |
| | results | (p, 4) | float64 | per plan: share of calibrated weights (-1: none), PSNR and uncalibrated PSNR (dB), origin of the search |
| icc | energy | (parts,) | float32 | share 0..1 of each part's square norm that its factors keep, parts sorted by name |
| | `<stack>.<block>.<layer>.<part>`.A | (out, rank) | any below | columns by importance, most important first |
| | `<stack>.<block>.<layer>.<part>`.B | (rank, in) | any below | |

Sizes: n recorded evaluations, k steps, p budgets, d channels of an input token, C channels of a hidden token, r directions, m sampled
tensors. The origin is 0 without a search, 1 for "general" and 2 for "even gaps" (`use.origin_plan`). "Any below" is any of float64,
float32, float16 and bfloat16. All values are finite.

Metadata: `duca_format` "1"; `about` (JSON of About); `sections` (JSON: per section and tensor its dtype, shape and sha256);
`fingerprint` (JSON: structure, dtype); `digest`, a sha256 over the other four. safetensors itself checks the file's layout, `digest`
the metadata and the sha256 of each tensor its values, so a change of any byte is noticed.

A file is replaced whole or not at all. A reader sees the old file or the new one, never a mixture.
"""

from __future__ import annotations

import glob
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .fingerprint import Fingerprint
from .sidecar_check import (
    CALIBRATE,
    COPY_AGAIN,
    FINGERPRINT,
    SECTIONS,
    About,
    Header,
    RefusedError,
    SidecarError,
    TensorInfo,
    describe,
    from_metadata,
    to_metadata,
)

__all__ = ["About", "Contents", "Sidecar", "SidecarError", "TensorInfo", "peek", "read", "write"]

_Path = str | os.PathLike[str]
_T = TypeVar("_T")
_STRAY_AGE = 3600.0  # seconds after which what a writer left belongs to nobody: none takes as long
_TRIES = 5  # reads of a file that is replaced meanwhile
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds before the file is replaced once more, which takes longer than reading a large one


@dataclass(frozen=True, eq=False)
class Sidecar:
    """The contents of a sidecar.

    Args:
        about: How the calibration was made.
        fingerprint: Fingerprint of the checkpoint.
        sections: Tensors by name, of the sections "forecast", "icc" or both. The docstring of this module has names, shapes and dtypes. No
            two tensors may share memory, as safetensors does not write such tensors.
    """

    about: About
    fingerprint: Fingerprint
    sections: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Contents:
    """The contents of a sidecar without the tensors of its sections.

    Args:
        about: How the calibration was made.
        fingerprint: Fingerprint of the checkpoint.
        tensors: Dtype, shape and hash of every tensor, by section and name.
    """

    about: About
    fingerprint: Fingerprint
    tensors: Mapping[str, Mapping[str, TensorInfo]]

    def nbytes(self, section: str) -> int:
        """Returns the bytes of a section's tensors, 0 for a section that the file does not have."""
        return sum(info.nbytes for info in self.tensors.get(section, {}).values())


def write(path: _Path, sidecar: Sidecar) -> None:
    """Writes a sidecar, in place of a file that is there. If two processes write at once, the file of the later one stays.

    safetensors before 0.8 copies all tensors first, so it takes their memory a second time.

    Args:
        path: The file. If it is a link, the file that it leads to is replaced.
        sidecar: What to write.

    Raises:
        SidecarError: If the sidecar breaks a rule of this module, if the folder cannot be written to, or if the disk is full. A file that
            was there before is left as it was.
    """
    try:
        target = Path(os.path.realpath(path))  # a link stays one, and what it points to is replaced
        tensors, metadata = _encode(sidecar)
        _sweep(target)
        _replace(target, tensors, metadata)
    except RefusedError as error:
        raise SidecarError(path, f"not written, because {error.reason}", error.remedy) from error
    except (OSError, SafetensorError) as error:
        remedy = "make its folder, allow writing to it or make room on the disk, and save again"
        raise SidecarError(path, f"not written: {_said(error)}", remedy) from error


def read(path: _Path, sections: Iterable[str] | None = None) -> Sidecar:
    """Reads a sidecar and checks what it reads.

    Args:
        path: The file.
        sections: Names of the sections to read. None reads all, () none. The tensors of other sections are neither read nor checked.

    Returns:
        The sidecar. Its tensors are copies on the CPU, so the file may change afterwards.

    Raises:
        SidecarError: If the file cannot be read, is damaged or of another format, or lacks a section that was asked for.
        ValueError: For a name that is no section of any sidecar.
    """
    wanted = None if sections is None else tuple(sections)
    if wanted is not None and not set(wanted) <= set(SECTIONS):
        raise ValueError(f"sections are {SECTIONS}, not {wanted}")
    return _steadily(path, lambda file: _sidecar(file, wanted))


def peek(path: _Path) -> Contents:
    """Reads metadata and fingerprint of a sidecar but no section, which is quick enough for lists of files.

    Raises:
        SidecarError: If the file cannot be read, is damaged or of another format.
    """
    return _steadily(path, _contents)


def _encode(sidecar: Sidecar) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns the tensors and the metadata of the file. Raises RefusedError for a sidecar that `read` would refuse."""
    groups = {**sidecar.sections, FINGERPRINT: {"values": sidecar.fingerprint.values}}
    catalogue: dict[str, dict[str, TensorInfo]] = {section: {} for section in groups}
    tensors = {}
    for section, group in groups.items():
        for name, tensor in group.items():
            ours = tensors[f"{section}.{name}"] = tensor.detach().cpu().contiguous()
            catalogue[section][name] = describe(ours)
    metadata = to_metadata(Header(sidecar.about, catalogue, sidecar.fingerprint.structure, sidecar.fingerprint.dtype))
    from_metadata(metadata)
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise RefusedError(f"{name} holds NaN or infinity", CALIBRATE)
    return tensors, metadata


def _replace(target: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    # safetensors has a temporary file of its own, which stays when the process is killed: `_sweep` finds it in this folder
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    folder.mkdir()
    try:
        written = folder / "written"
        written.touch()
        usual = written.stat().st_mode  # safetensors makes a file that only its owner may read
        save_file(tensors, written, metadata)
        with written.open("rb+") as file:
            os.fsync(file.fileno())
        written.chmod(usual)
        _put(written, target)
    finally:  # Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)


def _put(written: Path, target: Path) -> None:
    """Moves the written file to its target. Tries again on Windows, which does not replace a file while a reader has it open.

    torch opens files without FILE_SHARE_DELETE.
    """
    for pause in _PAUSES:
        with suppress(PermissionError):
            written.replace(target)
            return
        time.sleep(pause)
    written.replace(target)


def _sweep(target: Path) -> None:
    """Removes what writers of this file left when they were killed."""
    for stray in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with suppress(OSError):
            if time.time() - stray.stat().st_mtime > _STRAY_AGE:
                shutil.rmtree(stray) if stray.is_dir() else stray.unlink()  # a file is by an older version of the pack


def _sidecar(file: Any, wanted: tuple[str, ...] | None) -> Sidecar:
    header = _header(file)
    held = [section for section in SECTIONS if section in header.catalogue]
    missing = [section for section in wanted or () if section not in held]
    if missing:
        raise RefusedError(f"it has no {' and no '.join(missing)} section", "calibrate with it, or choose another file")
    sections = {section: _load(file, header, section) for section in held if wanted is None or section in wanted}
    return Sidecar(header.about, _fingerprint(file, header), MappingProxyType(sections))


def _contents(file: Any) -> Contents:
    header = _header(file)
    shown = {section: MappingProxyType(dict(header.catalogue[section])) for section in SECTIONS if section in header.catalogue}
    return Contents(header.about, _fingerprint(file, header), MappingProxyType(shown))


def _header(file: Any) -> Header:
    """Reads the metadata and checks that the file has exactly the tensors that it lists."""
    header = from_metadata(file.metadata())
    odd = {f"{section}.{name}" for section, tensors in header.catalogue.items() for name in tensors} ^ set(file.keys())
    if odd:
        raise RefusedError(f"its tensors are not those it lists ({', '.join(sorted(odd)[:3])})")
    return header


def _fingerprint(file: Any, header: Header) -> Fingerprint:
    values = _load(file, header, FINGERPRINT)["values"]
    try:
        return Fingerprint(header.structure, header.fingerprint_dtype, values)
    except ValueError as error:
        raise RefusedError(str(error), CALIBRATE) from error


def _load(file: Any, header: Header, section: str) -> Mapping[str, Tensor]:
    tensors = {}
    for name, listed in header.catalogue[section].items():
        # a clone: what safe_open gives is the mapped file itself, and what is checked must be what is used
        tensors[name] = file.get_tensor(f"{section}.{name}").clone()
        if describe(tensors[name]) != listed:
            raise RefusedError(f"{section}.{name} is damaged")
    return MappingProxyType(tensors)


@contextmanager
def _opened(path: _Path) -> Iterator[Any]:
    """Opens a file with `safe_open` and raises every error inside the context as a SidecarError."""
    try:
        with Path(path).open("rb"):  # safe_open calls a file that may not be read, and a folder, something else
            pass
        with safe_open(path, framework="pt") as file:
            yield file
    except RefusedError as error:
        raise SidecarError(path, error.reason, error.remedy) from error
    except OSError as error:
        remedy = "choose a file that is there and allow reading it, or calibrate"
        raise SidecarError(path, f"it cannot be read: {_said(error)}", remedy) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise SidecarError(path, f"it is damaged, cut short or no safetensors file ({error})", COPY_AGAIN) from error


def _steadily(path: _Path, take: Callable[[Any], _T], tries: int = _TRIES) -> _T:
    """Returns the result of `take` for the open file. Tries again if the file was replaced meanwhile.

    safe_open opens a file twice, for header and tensors, which may then be of two files.
    """
    before = _identity(path)
    try:
        with _opened(path) as file:
            return take(file)
    except SidecarError:
        if tries == 1 or _identity(path) == before:
            raise
    return _steadily(path, take, tries - 1)


def _identity(path: _Path) -> tuple[int, int, int] | None:
    with suppress(OSError, ValueError):
        stat = Path(path).stat()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
    return None


def _said(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)

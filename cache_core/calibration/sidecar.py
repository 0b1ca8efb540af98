"""The calibration sidecar: one safetensors file that keeps what a calibration run learned about a checkpoint.

Tensors are named `<section>.<name>`. A file has one or both sections, and always `fingerprint.values` (m, 64) float32.

| section | name | shape | dtype | |
| --- | --- | --- | --- | --- |
| forecast | gram | (n, n) | float64 | products of the block stack's increments at two steps |
| | uu | (n, n, d, d) | float32 | products of the input tokens at two steps |
| | uz | (n, n, d, r) | float16 or float32 | products of input tokens and increments, in the basis |
| | basis | (C, r) | float32 | directions of the increments that are kept |
| | sensitivity | (n,) | float64 | how much a step's error weighs in the final image |
| | step_times | (k,) | float64 | the model's time at every step of the calibrated schedule |
| | plans | (p, k) | float32 | what did best per budget: 0 skipped, 1 full, 2 calibrated |
| | results | (p, 4) | float64 | share of calibrated weights (-1: none), PSNR, uncalibrated PSNR, start of the search (0: none) |
| icc | energy | (parts,) | float32 | share of each part's square norm that its factors keep, by name |
| | `<stack>.<block>.<layer>.<part>`.A | (out, rank) | any below | columns by importance, most important first |
| | `<stack>.<block>.<layer>.<part>`.B | (rank, in) | any below | |

n: recorded evaluations; k: steps; p: budgets; d: channels of an input token; C: channels of a hidden token; r: kept directions.
Floats of 64, 32 or 16 bits, finite.

Metadata: `duca_format` "1"; `about` (JSON of About); `sections` (JSON: per section and tensor its dtype, shape and sha256);
`fingerprint` (JSON: structure, dtype); `digest`, a sha256 over the other four. safetensors itself sees to the file's layout,
`digest` to the metadata and the sha256 of each tensor to its values, so a change of any byte is noticed.

A file is replaced whole or not at all, and a reader meanwhile sees the old or the new one.
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
    """What a sidecar holds. sections: "forecast" and/or "icc", each its tensors by name; names, shapes and dtypes above.

    No two tensors overlap in memory: safetensors writes none that do.
    """

    about: About
    fingerprint: Fingerprint
    sections: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Contents:
    """What a sidecar says without its sections' tensors. tensors: what they are, per section and name."""

    about: About
    fingerprint: Fingerprint
    tensors: Mapping[str, Mapping[str, TensorInfo]]

    def nbytes(self, section: str) -> int:
        """Bytes of a section's tensors, 0 for one the file does not have."""
        return sum(info.nbytes for info in self.tensors.get(section, {}).values())


def write(path: _Path, sidecar: Sidecar) -> None:
    """Writes `sidecar` to `path`, replacing what is there in one go; of two writers at once the last wins.

    Raises SidecarError when the sidecar breaks a rule of this module, or when the folder cannot be written to or the disk
    is full; what was there before then still is. Memory: safetensors before 0.8 copies all tensors first.
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
    """The sidecar at `path`; with `sections`, those only, and no other section's tensors are read or checked. () reads none.

    Tensors are on the CPU and do not depend on the file any more.
    Raises SidecarError for any file that is not whole, sound and of this format, or that lacks a section asked for;
    ValueError for a section name that no file has.
    """
    wanted = None if sections is None else tuple(sections)
    if wanted is not None and not set(wanted) <= set(SECTIONS):
        raise ValueError(f"sections are {SECTIONS}, not {wanted}")
    return _steadily(path, lambda file: _sidecar(file, wanted))


def peek(path: _Path) -> Contents:
    """What the file at `path` says of itself, without reading its sections: for lists. Raises SidecarError as `read` does."""
    return _steadily(path, _contents)


def _encode(sidecar: Sidecar) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors and the metadata of the file. Raises RefusedError for what `read` would refuse."""
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
    """Windows replaces no file that is open, as it is to a reader for a moment: torch opens it without FILE_SHARE_DELETE."""
    for pause in _PAUSES:
        with suppress(PermissionError):
            written.replace(target)
            return
        time.sleep(pause)
    written.replace(target)


def _sweep(target: Path) -> None:
    """Removes what writers of this file left behind that were killed."""
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
    """The metadata, and that the file has just the tensors it lists."""
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
    """safe_open, with every way a file can be unfit as a SidecarError."""
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
    """What `take` makes of the open file; again where it is replaced meanwhile: safe_open opens it twice, for header and tensors."""
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

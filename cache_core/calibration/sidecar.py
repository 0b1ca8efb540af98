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
`fingerprint` (JSON: structure, dtype); `digest`, a sha256 over the other four. So every byte of a file is covered.

A file is replaced whole or not at all, and a reader meanwhile sees the old or the new one.
"""

from __future__ import annotations

import errno
import glob
import json
import os
import secrets
import struct
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeVar

from safetensors import SafetensorError, safe_open
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
    bytes_of,
    check,
    compare,
    describe,
    from_metadata,
    to_metadata,
)

__all__ = ["About", "Contents", "Sidecar", "SidecarError", "TensorInfo", "peek", "read", "write"]

_Path = str | os.PathLike[str]
_T = TypeVar("_T")
_STRAY_AGE = 3600.0  # seconds after which a temporary file belongs to nobody: a writer at work touches it all the time
_TRIES = 50  # reads of a file that is replaced meanwhile


@dataclass(frozen=True, eq=False)
class Sidecar:
    """What a sidecar holds. sections: "forecast" and/or "icc", each its tensors by name; names, shapes and dtypes above."""

    about: About
    fingerprint: Fingerprint
    sections: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Contents:
    """What a sidecar says without its tensors. structure: its fingerprint's. tensors: per section, by name."""

    about: About
    structure: str
    tensors: Mapping[str, Mapping[str, TensorInfo]]

    def nbytes(self, section: str) -> int:
        """Bytes of a section's tensors, 0 for one the file does not have."""
        return sum(info.nbytes for info in self.tensors.get(section, {}).values())


def write(path: _Path, sidecar: Sidecar) -> None:
    """Writes `sidecar` to `path`, replacing what is there in one go; of two writers at once the last wins.

    Raises SidecarError when the sidecar breaks a rule of this module, or when the folder cannot be written to or the disk
    is full; what was there before then still is.
    """
    try:
        target = Path(os.path.realpath(path))  # a link stays one, and what it points to is replaced
        pieces = _encode(sidecar)
        _sweep(target)
        _replace(target, pieces)
    except RefusedError as error:
        raise SidecarError(path, f"not written, because {error.reason}", error.remedy) from error
    except PermissionError as error:
        raise SidecarError(path, f"not written: {_said(error)}", "allow writing to its folder, or choose another") from error
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        remedy = "make room on the disk and save again" if full else "check that its folder exists and can be written to"
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
    return _steadily(path, lambda: _read(path, wanted))


def peek(path: _Path) -> Contents:
    """What the file at `path` says of itself, without reading a tensor: for lists. Raises SidecarError as `read` does."""

    def look() -> Contents:
        with _opened(path) as file:
            header = _header(file)
        shown = {section: MappingProxyType(dict(header.catalogue[section])) for section in SECTIONS if section in header.catalogue}
        return Contents(header.about, header.structure, MappingProxyType(shown))

    return _steadily(path, look)


def _encode(sidecar: Sidecar) -> list[bytes | memoryview]:
    """The file in pieces. Written here and not by safetensors, whose own temporary file and permissions we could not control."""
    if not set(sidecar.sections) <= set(SECTIONS):
        raise RefusedError(f"its sections are {sorted(sidecar.sections)}, and known are {', '.join(SECTIONS)}", CALIBRATE)
    groups = {**sidecar.sections, FINGERPRINT: {"values": sidecar.fingerprint.values}}
    tensors = {s: {n: t.detach().cpu().contiguous() for n, t in group.items()} for s, group in groups.items()}
    listed = {s: {n: describe(f"{s}.{n}", t) for n, t in group.items()} for s, group in tensors.items()}
    header = Header(sidecar.about, listed, sidecar.fingerprint.structure, sidecar.fingerprint.dtype)
    check(header)
    metadata = to_metadata(header)
    from_metadata(metadata)  # whatever is written can be read
    order = sorted(((s, n) for s, group in tensors.items() for n in group), key=lambda at: (-tensors[at[0]][at[1]].itemsize, at))
    entries: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for s, n in order:  # widest first, so that every tensor is aligned
        info = listed[s][n]
        entries[f"{s}.{n}"] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (offset, offset + info.nbytes)}
        offset += info.nbytes
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return [struct.pack("<Q", len(text)) + text, *(bytes_of(tensors[s][n]) for s, n in order)]


def _replace(target: Path, pieces: Iterable[bytes | memoryview]) -> None:
    temporary = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    try:
        with temporary.open("xb") as file:
            for piece in pieces:
                file.write(piece)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(target)
    except BaseException:  # Ctrl-C too
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise
    with suppress(OSError):  # not every system can; the file is in place either way
        folder = os.open(target.parent, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


def _sweep(target: Path) -> None:
    """Removes what writers of this file left behind that were killed."""
    with suppress(OSError):
        for stray in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
            with suppress(OSError):
                if time.time() - stray.stat().st_mtime > _STRAY_AGE:
                    stray.unlink()


def _read(path: _Path, wanted: tuple[str, ...] | None) -> Sidecar:
    with _opened(path) as file:
        header = _header(file)
        held = [section for section in SECTIONS if section in header.catalogue]
        missing = [section for section in wanted or () if section not in held]
        if missing:
            raise RefusedError(f"it has no {' and no '.join(missing)} section", "calibrate with it, or choose another file")
        values = _load(file, header, FINGERPRINT)["values"]
        try:
            fingerprint = Fingerprint(header.structure, header.fingerprint_dtype, values)
        except ValueError as error:
            raise RefusedError(str(error), CALIBRATE) from error
        chosen = held if wanted is None else [section for section in held if section in wanted]
        return Sidecar(header.about, fingerprint, MappingProxyType({section: _load(file, header, section) for section in chosen}))


def _load(file: Any, header: Header, section: str) -> Mapping[str, Tensor]:
    tensors = {}
    for name, listed in header.catalogue[section].items():
        # a clone: what safe_open gives is the mapped file itself, and what is checked must be what is used
        tensor = file.get_tensor(f"{section}.{name}").clone()
        compare(f"{section}.{name}", tensor, listed)
        tensors[name] = tensor
    return MappingProxyType(tensors)


def _header(file: Any) -> Header:
    """The metadata, and that the file has just the tensors it lists, in their shapes."""
    header = from_metadata(file.metadata())
    listed = {f"{section}.{name}": info for section, tensors in header.catalogue.items() for name, info in tensors.items()}
    if set(file.keys()) != set(listed):
        odd = sorted(set(file.keys()) ^ set(listed))
        raise RefusedError(f"its tensors are not those it lists ({', '.join(odd[:3])})")
    for name, info in listed.items():
        shape = tuple(file.get_slice(name).get_shape())
        if shape != info.shape:
            raise RefusedError(f"{name} has the shape {shape}, where {info.shape} was written")
    return header


@contextmanager
def _opened(path: _Path) -> Iterator[Any]:
    """safe_open, with every way a file can be unfit as a SidecarError."""
    try:
        if not Path(path).is_file():
            raise SidecarError(path, "there is no such file", "choose another file, or calibrate")
        with Path(path).open("rb"):  # safe_open does not tell a file that may not be read from one that cannot be
            pass
        with safe_open(path, framework="pt") as file:
            yield file
    except RefusedError as error:
        raise SidecarError(path, error.reason, error.remedy) from error
    except PermissionError as error:
        raise SidecarError(path, f"it cannot be read: {_said(error)}", "allow reading it") from error
    except OSError as error:
        raise SidecarError(path, f"it cannot be read: {_said(error)}", COPY_AGAIN) from error
    except (SafetensorError, RuntimeError, ValueError) as error:
        raise SidecarError(path, f"it is damaged, cut short or no safetensors file ({error})", COPY_AGAIN) from error


def _steadily(path: _Path, attempt: Callable[[], _T]) -> _T:
    """Tries again while the file is being replaced: safe_open opens it twice by name, header and tensors apart."""
    for _ in range(_TRIES):
        before = _identity(path)
        try:
            return attempt()
        except SidecarError:
            if _identity(path) == before:
                raise
    return attempt()


def _identity(path: _Path) -> tuple[int, int, int] | None:
    try:
        stat = Path(path).stat()
    except (OSError, ValueError):
        return None
    return stat.st_ino, stat.st_mtime_ns, stat.st_size


def _said(error: OSError) -> str:
    return error.strerror or str(error)

"""Reads and writes calibration sidecars.

A sidecar is one safetensors file that keeps what was learned about a checkpoint. Its tensors are named `<section>.<name>`. Every file has
`fingerprint.values` (m, 64) float32 and one or both of these sections:

| section | name | shape | dtype | content |
| --- | --- | --- | --- | --- |
| forecast | gram | (n, n) | float64 | inner products of the residuals z at two evaluations |
| | uu | (n, n, d, d) | float32 | products of the input tokens u at two evaluations |
| | uz | (n, n, d, r) | float16 or float32 | products of u and z at two evaluations, with z in the basis |
| | basis | (C, r) | float32 | directions of z that are kept |
| | sensitivity | (n,) | float64 | how far an error at each evaluation moves the final latent |
| | step_times | (k,) | float64 | the model's time at every step of the calibrated runs |
| | plans | (p, k) | float32 | the plan that did best with each budget, as kinds: 0 skipped, 1 full, 2 incremental |
| | results | (p, 4) | float64 | how each plan did, see below |
| icc | energy | (parts,) | float32 | share 0..1 of each part's square norm that its factors keep; parts in the order of their names |
| | `<stack>.<block>.<layer>.<part>`.A | (out, rank) | any, see below | factor A, columns by falling importance |
| | `<stack>.<block>.<layer>.<part>`.B | (rank, in) | any, see below | factor B, rows in the order of A's columns |

n is the number of recorded evaluations, k of steps, p of budgets, d of channels of an input token, C of channels of a hidden token and r of
kept directions. The residual z is the last block's output minus the embedded input. gram, uu and uz are means over tokens. Factors are
float64, float32, float16 or bfloat16. All values are finite.

The columns of `results` are the share 0..1 of calibrated weights in the predictor (-1: the uncalibrated predictor), the PSNR of the plan
against the uncached latents in dB, the PSNR of the uncalibrated setting in dB, and where the search for the plan began
(0: there was no search, otherwise the position in `calibration.ORIGINS`, from 1).

The metadata has five texts:

| key | content |
| --- | --- |
| duca_format | "1" |
| about | JSON of `About` |
| sections | JSON of the dtype, shape and sha256 of each tensor, by section and name |
| fingerprint | JSON of the fingerprint's structure and dtype |
| digest | sha256 over the other four texts |

Every changed byte is noticed: safetensors checks the file's layout, `digest` covers the metadata, and the sha256 of each tensor covers its
values.

A file is replaced whole or not at all. A reader meanwhile sees the old file or the new one.
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
_STRAY_AGE = 3600.0  # seconds after which a temporary folder is taken for that of a killed writer, as no write takes as long
_TRIES = 5  # how often a file is read if it is replaced during each read
_PAUSES = (0.1, 0.2, 0.4, 0.8, 1.6)  # seconds to wait after each failed replacement; together longer than reading a large file


@dataclass(frozen=True, eq=False)
class Sidecar:
    """The contents of a sidecar.

    Args:
        about: How the calibration was made.
        fingerprint: Fingerprint of the checkpoint.
        sections: "forecast", "icc" or both, with their tensors by name. The module's docstring lists names, shapes and dtypes. Tensors must
            not overlap in memory, because safetensors does not write such tensors.
    """

    about: About
    fingerprint: Fingerprint
    sections: Mapping[str, Mapping[str, Tensor]]


@dataclass(frozen=True)
class Contents:
    """The description of a sidecar, without the tensors of its sections.

    Args:
        about: How the calibration was made.
        fingerprint: Fingerprint of the checkpoint.
        tensors: The dtype, shape and sha256 of every tensor, by section and name.
    """

    about: About
    fingerprint: Fingerprint
    tensors: Mapping[str, Mapping[str, TensorInfo]]

    def nbytes(self, section: str) -> int:
        """Returns the bytes of a section's tensors. 0 for a section that the file does not have."""
        return sum(info.nbytes for info in self.tensors.get(section, {}).values())


def write(path: _Path, sidecar: Sidecar) -> None:
    """Writes a sidecar and replaces an existing file in one operation.

    If two processes write at once, the last one wins. safetensors before 0.8 needs memory for a copy of all tensors.

    Args:
        path: The file. If it is a link, the file that it points to is replaced.
        sidecar: The contents.

    Raises:
        SidecarError: If the sidecar breaks a rule of the format, the folder cannot be written to or the disk is full. An existing file is
            then unchanged.
    """
    try:
        target = Path(os.path.realpath(path))  # keeps a link and replaces the file that it points to
        tensors, metadata = _encode(sidecar)
        _sweep(target)
        _replace(target, tensors, metadata)
    except RefusedError as error:
        raise SidecarError(path, f"not written, because {error.reason}", error.remedy) from error
    except (OSError, SafetensorError) as error:
        remedy = "make its folder, allow writing to it or make room on the disk, and save again"
        raise SidecarError(path, f"not written: {_said(error)}", remedy) from error


def read(path: _Path, sections: Iterable[str] | None = None) -> Sidecar:
    """Reads a sidecar and checks everything that it reads.

    Args:
        path: The file.
        sections: Names of the sections to read. The tensors of other sections are neither read nor checked. () reads no section, None
            all that the file has.

    Returns:
        The sidecar. Its tensors are on the CPU and are copies, so the file may change afterwards.

    Raises:
        SidecarError: If the file cannot be read, is damaged, has another format or lacks one of `sections`.
        ValueError: If `sections` has a name other than "forecast" and "icc".
    """
    wanted = None if sections is None else tuple(sections)
    if wanted is not None and not set(wanted) <= set(SECTIONS):
        raise ValueError(f"sections are {SECTIONS}, not {wanted}")
    return _steadily(path, lambda file: _sidecar(file, wanted))


def peek(path: _Path) -> Contents:
    """Reads the description of a sidecar, but not its sections. This is fast enough for a list of files.

    Args:
        path: The file.

    Raises:
        SidecarError: If the file cannot be read, its description or fingerprint is damaged, or it has another format.
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
    """Writes a new file in a temporary folder and puts it in the place of `target`."""
    # in a folder, as safetensors makes a temporary file too: if the process is killed, `_sweep` later removes both
    folder = target.with_name(f".{target.name}.{secrets.token_hex(8)}.part")
    folder.mkdir()
    try:
        written = folder / "written"
        written.touch()
        usual = written.stat().st_mode  # restored below, as safetensors makes a file that only its owner may read
        save_file(tensors, written, metadata)
        with written.open("rb+") as file:
            os.fsync(file.fileno())
        written.chmod(usual)
        _put(written, target)
    finally:  # after Ctrl-C too
        shutil.rmtree(folder, ignore_errors=True)


def _put(written: Path, target: Path) -> None:
    """Replaces `target`, with pauses, as Windows refuses while a reader has it open (torch opens files without FILE_SHARE_DELETE)."""
    for pause in _PAUSES:
        with suppress(PermissionError):
            written.replace(target)
            return
        time.sleep(pause)
    written.replace(target)


def _sweep(target: Path) -> None:
    """Removes the temporary folders that killed writers of this file left."""
    for stray in target.parent.glob(f".{glob.escape(target.name)}.*.part"):
        with suppress(OSError):
            if time.time() - stray.stat().st_mtime > _STRAY_AGE:
                shutil.rmtree(stray) if stray.is_dir() else stray.unlink()  # older versions of the pack left files


def _sidecar(file: Any, wanted: tuple[str, ...] | None) -> Sidecar:
    """Reads the wanted sections of an open file, all for None."""
    header = _header(file)
    held = [section for section in SECTIONS if section in header.catalogue]
    missing = [section for section in wanted or () if section not in held]
    if missing:
        raise RefusedError(f"it has no {' and no '.join(missing)} section", "calibrate with it, or choose another file")
    sections = {section: _load(file, header, section) for section in held if wanted is None or section in wanted}
    return Sidecar(header.about, _fingerprint(file, header), MappingProxyType(sections))


def _contents(file: Any) -> Contents:
    """Reads the description of an open file."""
    header = _header(file)
    shown = {section: MappingProxyType(dict(header.catalogue[section])) for section in SECTIONS if section in header.catalogue}
    return Contents(header.about, _fingerprint(file, header), MappingProxyType(shown))


def _header(file: Any) -> Header:
    """Reads the metadata and checks that the file has exactly the tensors that are listed there."""
    header = from_metadata(file.metadata())
    odd = {f"{section}.{name}" for section, tensors in header.catalogue.items() for name in tensors} ^ set(file.keys())
    if odd:
        raise RefusedError(f"its tensors are not those it lists ({', '.join(sorted(odd)[:3])})")
    return header


def _fingerprint(file: Any, header: Header) -> Fingerprint:
    """Reads the fingerprint of an open file."""
    values = _load(file, header, FINGERPRINT)["values"]
    try:
        return Fingerprint(header.structure, header.fingerprint_dtype, values)
    except ValueError as error:
        raise RefusedError(str(error), CALIBRATE) from error


def _load(file: Any, header: Header, section: str) -> Mapping[str, Tensor]:
    """Reads a section's tensors and checks them against the metadata."""
    tensors = {}
    for name, listed in header.catalogue[section].items():
        # cloned, as safe_open returns a view of the mapped file, which could change after the check
        tensors[name] = file.get_tensor(f"{section}.{name}").clone()
        if describe(tensors[name]) != listed:
            raise RefusedError(f"{section}.{name} is damaged")
    return MappingProxyType(tensors)


@contextmanager
def _opened(path: _Path) -> Iterator[Any]:
    """Opens a file with safe_open and raises SidecarError for every error of opening or reading it."""
    try:
        with Path(path).open("rb"):  # raises the OSError that fits, which safe_open does not for a folder or a file without read permission
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
    """Returns the result of `take` for the open file, and tries again if the file was replaced during a failed read.

    A replacement can mix two files, because safe_open opens the path twice, once for the header and once for the tensors.
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
    """Returns numbers that change when the file is replaced. None if there is no file."""
    with suppress(OSError, ValueError):
        stat = Path(path).stat()
        return stat.st_ino, stat.st_mtime_ns, stat.st_size
    return None


def _said(error: Exception) -> str:
    """Returns the text of an error, without number and path if the system has one."""
    return getattr(error, "strerror", None) or str(error)

"""Converts the metadata of sidecars to text and back, and checks files before writing and after reading."""

from __future__ import annotations

import hashlib
import json
import os
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

FORMAT = "1"
SECTIONS = ("forecast", "icc")
FINGERPRINT = "fingerprint"
ENERGY = "energy"
DTYPES = MappingProxyType({"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16})
COPY_AGAIN = "copy the file again, or calibrate again"
CALIBRATE = "calibrate again"

_KEYS = ("about", "digest", "duca_format", "fingerprint", "sections")
_LARGEST = sys.float_info.max
_NAME = re.compile(r"[A-Za-z0-9_.\-]+", re.ASCII)
# shape and allowed dtypes: one letter per dimension, where equal letters are equal sizes and a digit is a size
_FORECAST = MappingProxyType(
    {
        "gram": ("nn", ("F64",)),
        "uu": ("nndd", ("F32",)),
        "uz": ("nndr", ("F16", "F32")),
        "basis": ("Cr", ("F32",)),
        "sensitivity": ("n", ("F64",)),
        "step_times": ("k", ("F64",)),
        "plans": ("pk", ("F32",)),
        "results": ("p4", ("F64",)),
    }
)


class SidecarError(Exception):
    """Raised if a sidecar cannot be read or written.

    Args:
        path: The file.
        reason: What is wrong.
        remedy: What the user can do about it.
    """

    def __init__(self, path: str | os.PathLike[str], reason: str, remedy: str) -> None:
        super().__init__(os.fspath(path), reason, remedy)  # all three arguments, so that the error can be pickled
        self.path = os.fspath(path)
        self.reason = reason
        self.remedy = remedy

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}; {self.remedy}"


class RefusedError(ValueError):
    """Raised if a sidecar breaks a rule of the format. Callers that know the path turn it into a SidecarError.

    Args:
        reason: The rule that is broken.
        remedy: What the user can do about it.
    """

    def __init__(self, reason: str, remedy: str = COPY_AGAIN) -> None:
        super().__init__(reason)
        self.reason = reason
        self.remedy = remedy


@dataclass(frozen=True)
class About:
    """Describes how a calibration was made.

    Args:
        family: Name of the model family in this pack.
        model_name: Name of the model, or the family's where the host knows none.
        sampler: The host's name of the sampler.
        scheduler: The host's name of the scheduler.
        steps: Number of steps, k.
        guidance: CFG scale.
        sigmas: The k+1 noise levels.
        times: The model's time, scaled to 0..1, at each of the n recorded evaluations.
        token_grid: Size of the latent, (H, W) or (T, H, W).
        prompt_count: Number of prompts.
        seeds: Seed of each prompt's noise.
        rank: Rank of the factors. 0 without the section "icc".
        method: Method of the factors: "ca_svd", "cd_svd" or "svd". "" without the section "icc".
        versions: Versions of "pack", "torch" and "comfyui".
        created: Date and time in ISO 8601.
    """

    family: str
    model_name: str
    sampler: str
    scheduler: str
    steps: int
    guidance: float
    sigmas: tuple[float, ...]
    times: tuple[float, ...]
    token_grid: tuple[int, ...]
    prompt_count: int
    seeds: tuple[int, ...]
    rank: int
    method: str
    versions: Mapping[str, str] = field(hash=False)
    created: str


@dataclass(frozen=True)
class TensorInfo:
    """Describes a tensor in the metadata.

    Args:
        dtype: Dtype by its name in safetensors, such as "F32".
        shape: Shape.
        sha256: sha256 of the tensor's bytes, in hex.
    """

    dtype: str
    shape: tuple[int, ...]
    sha256: str

    @property
    def nbytes(self) -> int:
        """The bytes of the tensor's values."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


Catalogue = Mapping[str, Mapping[str, TensorInfo]]


@dataclass(frozen=True)
class Header:
    """The parsed metadata of a sidecar.

    Args:
        about: How the calibration was made.
        catalogue: Descriptions of all tensors by section and name, with those of the section "fingerprint".
        structure: Structure of the fingerprint.
        fingerprint_dtype: Dtype of the fingerprint.
    """

    about: About
    catalogue: Catalogue
    structure: str
    fingerprint_dtype: str


def to_metadata(header: Header) -> dict[str, str]:
    """Returns the safetensors metadata of a file.

    Args:
        header: The metadata to convert.

    Raises:
        RefusedError: If JSON cannot hold a value, such as NaN or an unknown type.
    """
    about = {f.name: getattr(header.about, f.name) for f in fields(About)} | {"versions": dict(header.about.versions)}
    listed = {s: {n: vars(info) for n, info in tensors.items()} for s, tensors in header.catalogue.items()}
    texts = {"duca_format": FORMAT, "about": _canonical(about), "sections": _canonical(listed)}
    texts["fingerprint"] = _canonical({"structure": header.structure, "dtype": header.fingerprint_dtype})
    return texts | {"digest": _digest(texts)}


def from_metadata(metadata: Mapping[str, str] | None) -> Header:
    """Parses the safetensors metadata of a file and checks every rule that does not need the tensors.

    Args:
        metadata: Texts by key. None if the file has none.

    Raises:
        RefusedError: If the metadata is damaged, of another format or breaks a rule.
    """
    if not metadata or "duca_format" not in metadata:
        raise RefusedError("it is a safetensors file, but no calibration sidecar", "choose a file that calibration has written")
    version = metadata["duca_format"]
    if version != FORMAT:
        if re.fullmatch(r"[1-9][0-9]{0,8}", version, re.ASCII):
            raise RefusedError(f"it is written in format {version}, and this version of the pack reads {FORMAT}", "update the pack")
        raise RefusedError("its format number is damaged")
    if tuple(sorted(metadata)) != _KEYS or metadata["digest"] != _digest(metadata):
        raise RefusedError("its metadata is damaged")
    about = _about(_parsed(metadata["about"]))
    fingerprint = _parsed(metadata["fingerprint"])
    if not isinstance(fingerprint, dict) or [type(fingerprint.get(k)) for k in ("structure", "dtype")] != [str, str]:
        raise RefusedError("its fingerprint is not of the form this version reads", CALIBRATE)
    header = Header(about, _catalogue(_parsed(metadata["sections"])), fingerprint["structure"], fingerprint["dtype"])
    check(header)
    return header


def check(header: Header) -> None:
    """Checks the names, shapes and dtypes of all tensors.

    Args:
        header: The parsed metadata.

    Raises:
        RefusedError: If one of them does not belong in a sidecar.
    """
    sections = header.catalogue.keys() - {FINGERPRINT}
    if not sections or not sections <= set(SECTIONS) or set(header.catalogue.get(FINGERPRINT, ())) != {"values"}:
        raise RefusedError(
            f"its sections are {sorted(header.catalogue)}, where {FINGERPRINT} and one or both of {SECTIONS} belong", CALIBRATE
        )
    for section, tensors in header.catalogue.items():
        for name, info in tensors.items():
            if not _NAME.fullmatch(name) or info.dtype not in DTYPES or not info.shape or min(info.shape) < 1:
                raise RefusedError(f"its tensor {section}.{name} has the shape {info.shape} and dtype {info.dtype}", CALIBRATE)
    if "forecast" in sections:
        _check_forecast(header.about, header.catalogue["forecast"])
    if "icc" in sections:
        _check_icc(header.catalogue["icc"])


def describe(tensor: Tensor) -> TensorInfo:
    """Describes a tensor for the metadata.

    Args:
        tensor: A contiguous tensor on the CPU.

    Returns:
        The description. A dtype that sidecars do not have gets torch's name, which `check` refuses.
    """
    dtype = next((text for text, kind in DTYPES.items() if kind is tensor.dtype), str(tensor.dtype))
    memory = tensor.reshape(-1).view(torch.uint8).numpy().data  # shares memory with the tensor
    return TensorInfo(dtype, tuple(tensor.shape), hashlib.sha256(memory).hexdigest())


def _check_forecast(about: About, tensors: Mapping[str, TensorInfo]) -> None:
    """Checks the names, shapes and dtypes of the section "forecast"."""
    _same("forecast", tensors, _FORECAST)
    if len(about.sigmas) != about.steps + 1:
        raise RefusedError(f"{about.steps} steps have {len(about.sigmas)} noise levels", CALIBRATE)
    sizes = {"n": len(about.times), "k": about.steps, "4": 4}
    for name, (letters, dtypes) in _FORECAST.items():
        info = tensors[name]
        if len(info.shape) != len(letters) or any(sizes.setdefault(letter, size) != size for letter, size in zip(letters, info.shape)):
            known = ", ".join(f"{letter} = {size}" for letter, size in sizes.items())
            raise RefusedError(f"forecast.{name} has the shape {info.shape}, where ({', '.join(letters)}) belongs with {known}", CALIBRATE)
        if info.dtype not in dtypes:
            raise RefusedError(f"forecast.{name} is {info.dtype}, where {' or '.join(dtypes)} belongs", CALIBRATE)


def _check_icc(tensors: Mapping[str, TensorInfo]) -> None:
    """Checks the names and shapes of the section "icc"."""
    if not tensors:
        raise RefusedError("its icc section is empty", CALIBRATE)
    parts = sorted({name.rpartition(".")[0] for name in tensors if name != ENERGY})
    _same("icc", tensors, [ENERGY, *(f"{part}.{factor}" for part in parts for factor in "AB")])
    if tensors[ENERGY].shape != (len(parts),):
        raise RefusedError(f"icc.{ENERGY} has the shape {tensors[ENERGY].shape} for {len(parts)} parts", CALIBRATE)
    for part in parts:
        a, b = tensors[f"{part}.A"].shape, tensors[f"{part}.B"].shape
        if not part or len(a) != 2 or len(b) != 2 or a[1] != b[0]:
            raise RefusedError(f"icc.{part} pairs A {a} with B {b}, which is not (out, rank) with (rank, in)", CALIBRATE)


def _same(section: str, found: Iterable[str], expected: Iterable[str]) -> None:
    """Checks that a section has exactly the expected names."""
    missing, extra = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    if missing:
        raise RefusedError(f"its {section} section lacks {', '.join(missing[:3])}", CALIBRATE)
    if extra:
        raise RefusedError(f"its {section} section has {', '.join(extra[:3])}, which does not belong there", CALIBRATE)


def _catalogue(raw: Any) -> Catalogue:
    """Converts parsed JSON to descriptions of tensors."""
    try:
        return {section: {name: _info(**entry) for name, entry in tensors.items()} for section, tensors in raw.items()}
    except (AttributeError, TypeError) as error:
        raise RefusedError("its list of tensors is not of the form this version reads", CALIBRATE) from error


def _info(dtype: Any, shape: Any, sha256: Any) -> TensorInfo:
    """Converts the fields of one tensor's description."""
    return TensorInfo(_scalar(str)(dtype), _numbers(int)(shape), sha256)


def _about(raw: Any) -> About:
    """Converts parsed JSON to `About`."""
    if not isinstance(raw, dict) or set(raw) != {f.name for f in fields(About)}:
        raise RefusedError("its description is not of the form this version reads", CALIBRATE)
    return About(**{f.name: _FIELDS[str(f.type)](raw[f.name]) for f in fields(About)})


def _scalar(kind: type) -> Any:
    """Returns a function that checks and converts one value. No bool passes as a number, and no float that is not finite."""

    def convert(value: Any) -> Any:
        right = isinstance(value, (int, float) if kind is float else kind) and not isinstance(value, bool)
        if not right or (kind is float and not abs(value) <= _LARGEST):
            raise RefusedError(f"its description holds {str(value)[:40]!r} where {kind.__name__} belongs", CALIBRATE)
        return kind(value)

    return convert


def _numbers(kind: type) -> Any:
    """Returns a function that converts a list of values to a tuple."""

    def convert(value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            raise RefusedError(f"its description holds {str(value)[:40]!r} where a list belongs", CALIBRATE)
        return tuple(_scalar(kind)(item) for item in value)

    return convert


def _texts(value: Any) -> dict[str, str]:
    """Checks a table of texts."""
    if not isinstance(value, dict):
        raise RefusedError("its description holds no table of versions", CALIBRATE)
    return {_scalar(str)(key): _scalar(str)(text) for key, text in value.items()}


# how each field of About is converted, by the text of its annotation
_FIELDS = MappingProxyType(
    {
        "str": _scalar(str),
        "int": _scalar(int),
        "float": _scalar(float),
        "tuple[float, ...]": _numbers(float),
        "tuple[int, ...]": _numbers(int),
        "Mapping[str, str]": _texts,
    }
)


def _canonical(value: Any) -> str:
    """Returns JSON that is the same for equal values."""
    try:
        return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    except (TypeError, ValueError) as error:
        raise RefusedError(f"its description cannot be kept: {error}", CALIBRATE) from error


def _parsed(text: str) -> Any:
    """Parses JSON."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RefusedError("its metadata is damaged") from error


def _digest(texts: Mapping[str, str]) -> str:
    """Returns the sha256 over all texts except the digest.

    It is taken over the texts and not the parsed values, so another spelling of the same JSON does not pass. The texts are joined by
    newlines, which JSON on one line does not contain.
    """
    return hashlib.sha256("\n".join(texts[key] for key in sorted(_KEYS) if key != "digest").encode()).hexdigest()

"""Recognises a checkpoint by a sample of its weights, whatever dtype they were loaded in."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TENSORS = 64  # at most this many tensors are sampled
VALUES = 64  # values per sampled tensor; smaller tensors do not count
_AGREEING = 0.999  # share of the sampled values that must agree: a few may be clipped by a narrow dtype
_COARSE = (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16)
_SLACK = 2.0  # both sides may be rounded, and some loaders round stochastically, which errs by a whole step


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """Identifies a checkpoint by names, shapes and some values of its weights. Compare with `matches`, not with `==`.

    Args:
        structure: sha256 over names and shapes of all tensors that count, 64 hex characters.
        dtype: The least precise dtype among these tensors, as torch names it ("bfloat16"). Values may be rounded as in this dtype.
        values: (m, 64) float32 with 1 <= m <= 64, one row for each sampled tensor. The sampled tensors are evenly spread over the sorted
            names. A row of NaN stands for a tensor whose values are not known.

    Raises:
        ValueError: If an argument does not have that form.
    """

    structure: str
    dtype: str
    values: Tensor

    def __post_init__(self) -> None:
        if len(self.structure) != 64 or set(self.structure) - set("0123456789abcdef"):
            raise ValueError("the structure of a fingerprint is a sha256 in hex")
        kind = getattr(torch, self.dtype, None)
        if not isinstance(kind, torch.dtype) or not kind.is_floating_point:
            raise ValueError(f"{self.dtype!r} is no floating dtype")
        rows = self.values.shape[0] if self.values.dim() == 2 else 0
        if self.values.dtype is not torch.float32 or not 1 <= rows <= TENSORS or self.values.shape[1] != VALUES:
            raise ValueError(f"the values of a fingerprint are float32 (1..{TENSORS}, {VALUES})")

    @classmethod
    def of(cls, named_tensors: Iterable[tuple[str, Tensor]], with_vectors: bool = False) -> Fingerprint:
        """Takes the fingerprint of weights.

        Floating-point tensors with at least two dimensions and 64 elements count. These come from the checkpoint, under names that hosts
        agree on. Vectors (a norm's scale) are renamed by some hosts, and some vectors are in no checkpoint.

        Args:
            named_tensors: (name, weight) pairs in any order. Names are the model's own, without the prefix of a loader. Packed weights
                (GGUF) must be given dense, as their integers do not count. Pairs are taken one at a time and only samples are kept, so
                an iterator may make weights dense one after another.
            with_vectors: Whether vectors count too, as in the fingerprints of older sidecars.

        Raises:
            ValueError: If no tensor counts.
        """
        found = []
        for name, weight in named_tensors:
            counts = weight.numel() >= VALUES and (with_vectors or weight.dim() > 1)
            if counts and weight.is_floating_point():
                found.append((name, tuple(weight.shape), weight.dtype, _sample(weight.detach())))
        if not found:
            raise ValueError("there are no weights to take a fingerprint of")
        found.sort(key=lambda entry: entry[0])
        structure = structure_of({name: shape for name, shape, _, _ in found})
        coarsest = max((dtype for _, _, dtype, _ in found), key=lambda dtype: torch.finfo(dtype).eps)
        chosen = _spread(len(found), min(TENSORS, len(found)))
        return cls(structure, str(coarsest).removeprefix("torch."), torch.stack([found[i][3] for i in chosen]))

    def matches(self, other: Fingerprint) -> bool:
        """Returns whether both fingerprints are of one checkpoint.

        They are if the structures are equal and 99.9 % of the values differ by no more than twice the rounding of the coarser dtype. So a
        fine-tune loaded in bf16, fp16 or fp32 does not match its base. Loaded in fp8, it does not if its weights moved by more than the
        steps of fp8.
        """
        if self.structure != other.structure or self.values.shape != other.values.shape:
            return False
        mine, theirs = self._rounding(), other._rounding()
        relative, absolute = torch.maximum(mine, theirs)
        a, b = self.values.double().cpu(), other.values.double().cpu()
        allowed = _SLACK * (relative * torch.maximum(a.abs(), b.abs()) + absolute)
        agrees = ((a - b).abs() <= allowed)[~(a + b).isnan()]
        return bool(len(agrees)) and agrees.double().mean().item() >= _AGREEING

    def _rounding(self) -> Tensor:
        """Returns half a step of each row's dtype, (2, m, 1) float64: relative to a normal value, and absolute near zero.

        The relative one is 2^-4 for fp8 e4m3 (absolute 2^-10), 2^-8 for bf16, 2^-11 for fp16 and 2^-24 for fp32. A row that a coarser
        dtype holds exactly was rounded to that dtype before, as when an fp8 file is loaded in bf16.
        """
        rows = self.values.cpu()
        steps = _half_step(getattr(torch, self.dtype)).expand(2, len(rows), 1)
        for kind in _COARSE:
            exact = (rows.to(kind).float() == rows).all(dim=1)[:, None]
            steps = torch.where(exact, torch.maximum(steps, _half_step(kind)), steps)
        return steps

    @property
    def short(self) -> str:
        """8 hex characters for file names, made from the structure and the signs of the sampled values.

        Rounding keeps signs, also of values rounded to zero (-0.0), so all casts of one checkpoint have the same characters. Only dtypes
        without a negative zero (the fnuz dtypes of fp8) may change them.
        """
        signs = torch.signbit(self.values.cpu()).flatten().tolist()
        return hashlib.sha256((self.structure + "".join("-" if sign else "+" for sign in signs)).encode()).hexdigest()[:8]


def structure_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns the `structure` of a fingerprint in which tensors of these names and shapes count."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def _spread(count: int, wanted: int) -> list[int]:
    """Returns `wanted` of the indices 0..count-1, evenly spread, the first and the last included."""
    return [i * (count - 1) // max(1, wanted - 1) for i in range(wanted)]


def _sample(weight: Tensor) -> Tensor:
    """Returns 64 values of a weight, evenly spread, (64,) float32 on the CPU. It copies no others, whatever the strides."""
    if weight.dtype.itemsize == 1:  # indexing is not defined for every fp8 kind on every device, for bytes it is
        return _pick(weight.view(torch.uint8)).view(weight.dtype).float().nan_to_num(0.0, 0.0, 0.0).cpu()
    return _pick(weight).float().nan_to_num(0.0, 0.0, 0.0).cpu()


def _pick(weight: Tensor) -> Tensor:
    # with both ends included the stride is hardly ever a multiple of the row length, so columns differ too
    indices = torch.tensor(_spread(weight.numel(), VALUES), device=weight.device)
    return weight[torch.unravel_index(indices, weight.shape)]


def _half_step(dtype: torch.dtype) -> Tensor:
    info = torch.finfo(dtype)
    return torch.tensor([info.eps / 2, info.tiny * info.eps / 2], dtype=torch.float64)[:, None, None]

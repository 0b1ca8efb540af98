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
    """What is kept of the base weights; compare with `matches`, not with `==`.

    structure: sha256 over names and shapes of all tensors that count, 64 hex characters; equal only where the same ones count.
    dtype: the least precise dtype among them, as torch names it ("bfloat16"); it says how far values may be rounded.
    values: (m, 64) float32 with 1 <= m <= 64: a row per sampled tensor, evenly spread over the names in order. A row of NaN is of
    a tensor that is not there to be looked at.
    Raises ValueError when the three are not of that form.
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
        """Fingerprint of (name, weight) pairs, in any order; names should be the model's own, without a loader's prefix.

        Floating tensors of two dimensions or more and 64 elements or more count. A checkpoint pins these, and hosts agree on their
        names, whereas they rename vectors (a norm's scale) and make some that no checkpoint has.
        with_vectors: count vectors too, as fingerprints in older sidecars did.

        Pairs are taken one at a time and only their samples are kept, so weights may be made dense on the fly.
        Packed formats (GGUF) are not floating and do not count: give their dense weights.
        Raises ValueError when nothing counts.
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
        """Whether both are of one checkpoint: equal structure, and 99.9 % of the values equal up to twice the coarser dtype's rounding.

        In bf16, fp16 or fp32 a fine-tune is told apart; between fp8 loads only one whose weights moved by more than fp8's steps.
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
        """Half a step of each row's dtype (2, m, 1) float64: relative to a normal value, and absolute near zero.

        fp8 e4m3: 2^-4 and 2^-10; bf16 2^-8; fp16 2^-11; fp32 2^-24. A row that a coarser dtype holds exactly was rounded to
        that before, as when an fp8 file is loaded in bf16.
        """
        rows = self.values.cpu()
        steps = _half_step(getattr(torch, self.dtype)).expand(2, len(rows), 1)
        for kind in _COARSE:
            exact = (rows.to(kind).float() == rows).all(dim=1)[:, None]
            steps = torch.where(exact, torch.maximum(steps, _half_step(kind)), steps)
        return steps

    @property
    def short(self) -> str:
        """8 hex characters for file names, from the structure and the signs of the sampled values.

        Rounding keeps the sign, that of a value rounded to zero included (-0.0), so this is the same for every cast of one
        checkpoint to an IEEE-like dtype. Only formats without a negative zero (the fnuz fp8 kinds) may change it.
        """
        signs = torch.signbit(self.values.cpu()).flatten().tolist()
        return hashlib.sha256((self.structure + "".join("-" if sign else "+" for sign in signs)).encode()).hexdigest()[:8]


def structure_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """The structure of a fingerprint for which tensors of these names and shapes count."""
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def _spread(count: int, wanted: int) -> list[int]:
    """`wanted` of the indices 0..count-1, evenly spread and with both ends."""
    return [i * (count - 1) // max(1, wanted - 1) for i in range(wanted)]


def _sample(weight: Tensor) -> Tensor:
    """64 values (64,) float32 on the CPU, spread over all of `weight`; copies no more than those, whatever its strides."""
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

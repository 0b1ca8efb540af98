"""Recognises a checkpoint by a sample of its weights, in whatever dtype they were loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

TENSORS = 64  # largest number of tensors that are sampled
VALUES = 64  # values per sampled tensor; tensors with fewer do not count
_AGREEING = 0.999  # share of the sampled values that must agree; the others may have been clipped by a narrow dtype
_COARSE = (torch.float8_e5m2, torch.float8_e4m3fn, torch.bfloat16, torch.float16)
_SLACK = 2.0  # in half steps, as both sides may be rounded, and loaders that round stochastically err by a whole step


@dataclass(frozen=True, eq=False)
class Fingerprint:
    """A sample of a checkpoint's base weights. Compare two with `matches`, not with `==`.

    Args:
        structure: sha256 over the names and shapes of all tensors that count, 64 hex characters. Fingerprints of one checkpoint have the
            same structure only if they were taken with the same `with_vectors`.
        dtype: The least precise dtype of these tensors by its name in torch, such as "bfloat16". It limits how far values may be rounded.
        values: (m, 64) float32 with 1 ≤ m ≤ 64, one row for each sampled tensor. These are evenly spread over the sorted names. A row of
            NaN stands for a tensor whose values are not available, and `matches` ignores it.

    Raises:
        ValueError: If an argument does not have this form.
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
        """Takes the fingerprint of a checkpoint's weights.

        Floating-point tensors with at least two dimensions and 64 elements count. The checkpoint determines these, and hosts agree on their
        names. Vectors (such as a norm's scale) do not count, because hosts rename them and make some that no checkpoint has.

        Args:
            named_tensors: Pairs of name and weight, in any order. Names are the model's own, without a loader's prefix. Packed weights
                (GGUF) must be given as dense ones, because packed tensors are not floating-point and do not count. An iterator may make
                each dense weight when it is asked for it, because only the sampled values are kept.
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
        """Returns whether both fingerprints are of the same checkpoint.

        They match if their structures are equal and 99.9 % of the values agree within twice the rounding error of the coarser dtype. A
        fine-tune in bf16, fp16 or fp32 does not match its base. Between fp8 weights it is only distinguished if its weights moved by more
        than fp8's steps.
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
        """Returns half a step of each row's dtype, (2, m, 1) float64: relative to normal values, and absolute near zero.

        The relative half steps are 2^-4 for fp8 e4m3 (absolute 2^-10), 2^-8 for bf16, 2^-11 for fp16 and 2^-24 for fp32. A row that a
        coarser dtype holds exactly counts as rounded to that dtype, as when an fp8 file is loaded in bf16.
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

        It is the same for every cast of one checkpoint to an IEEE-like dtype, because rounding keeps signs, also when it rounds to -0.0.
        Only formats without a negative zero (the fnuz kinds of fp8) may change it.
        """
        signs = torch.signbit(self.values.cpu()).flatten().tolist()
        return hashlib.sha256((self.structure + "".join("-" if sign else "+" for sign in signs)).encode()).hexdigest()[:8]


def structure_of(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """Returns the structure of a fingerprint.

    Args:
        shapes: Shapes by name, of the tensors that count.
    """
    return hashlib.sha256(json.dumps(sorted(shapes.items())).encode()).hexdigest()


def _spread(count: int, wanted: int) -> list[int]:
    """Returns `wanted` of the indices 0..count-1, evenly spread and with both ends."""
    return [i * (count - 1) // max(1, wanted - 1) for i in range(wanted)]


def _sample(weight: Tensor) -> Tensor:
    """Returns 64 values (64,) float32 on the CPU, spread over all of `weight`. It copies only these, whatever the strides."""
    if weight.dtype.itemsize == 1:  # as bytes, because not every device can index every kind of fp8
        return _pick(weight.view(torch.uint8)).view(weight.dtype).float().nan_to_num(0.0, 0.0, 0.0).cpu()
    return _pick(weight).float().nan_to_num(0.0, 0.0, 0.0).cpu()


def _pick(weight: Tensor) -> Tensor:
    """Returns 64 values of `weight` in its own dtype."""
    # as both ends are included, the distance is hardly ever a multiple of the row length, so the columns differ too
    indices = torch.tensor(_spread(weight.numel(), VALUES), device=weight.device)
    return weight[torch.unravel_index(indices, weight.shape)]


def _half_step(dtype: torch.dtype) -> Tensor:
    """Returns half a step of a dtype (2, 1, 1) float64, relative and absolute."""
    info = torch.finfo(dtype)
    return torch.tensor([info.eps / 2, info.tiny * info.eps / 2], dtype=torch.float64)[:, None, None]

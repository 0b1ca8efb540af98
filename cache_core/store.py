"""Keeps tensors between evaluations: on a chosen device, in a chosen precision, and knows its bytes."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_FP8 = torch.float8_e4m3fn
_FP8_MAX = 448.0

Unrecorded = Callable[[], AbstractContextManager[None]]
"""A context around the allocation of what outlives a block. Some hosts record a block's allocations and expect them freed at its end."""


class StoreFullError(Exception):
    """The device has no room for another feature."""


@contextmanager
def memory_ends() -> Iterator[None]:
    """Around what is done for the cache alone: a lack of memory there becomes StoreFullError, as the model can do without."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StoreFullError from error


@dataclass(frozen=True)
class StoreFormat:
    """device: where features are kept, None for the device they come from.
    dtype: what they are kept in, None for their own; torch.float8_e4m3fn is scaled per token.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def bytes_per_token(self, channels: int, dtype: torch.dtype) -> int:
        kept = self.dtype or dtype
        return channels * kept.itemsize + (4 if kept is _FP8 else 0)


@dataclass(eq=False)
class Feature:
    """One kept tensor (B, L, C), with a scale (B, L, 1) if it is kept in fp8. Owned by its store."""

    data: Tensor
    scale: Tensor | None = None


class FeatureStore:
    """Copies what it is given; only it writes to what it keeps. Several threads may use it, each with features of its own.

    Memory of a dropped feature serves the next one of its shape (histories rotate) until `trim` or `clear`.
    bytes: all memory held, spare memory included. peak_bytes: the most so far. unrecorded: see there.
    """

    def __init__(self, fmt: StoreFormat = StoreFormat(), unrecorded: Unrecorded = nullcontext) -> None:
        self.format = fmt
        self.bytes = 0
        self.peak_bytes = 0
        self.unrecorded = unrecorded
        self._lock = threading.Lock()
        self._spare: dict[tuple, list[Tensor]] = defaultdict(list)

    def put(self, tensor: Tensor) -> Feature:
        """Keeps a copy of `tensor` (B, L, C). Raises StoreFullError where the device has no room for it."""
        with memory_ends(), self.unrecorded():
            values, scale = self._encode(tensor)
            return Feature(self._copy(values), self._copy(scale) if scale is not None else None)

    def load(self, feature: Feature, like: Tensor) -> Tensor:
        """The feature in the dtype and on the device of `like`. Not to be written to: it may be the kept memory itself."""
        return self._decode(feature.data, feature.scale, like)

    def load_tokens(self, feature: Feature, tokens: Tensor, like: Tensor) -> Tensor:
        """Chosen tokens only: (B, len(tokens), C)."""
        tokens = tokens.to(feature.data.device)
        scale = feature.scale[:, tokens] if feature.scale is not None else None
        return self._decode(_raw(feature.data)[:, tokens].view(feature.data.dtype), scale, like)

    def write_tokens(self, feature: Feature, tokens: Tensor, fresh: Tensor) -> None:
        """Overwrites chosen tokens of a kept feature with `fresh` (B, len(tokens), C)."""
        values, scale = self._encode(fresh)
        target = feature.data
        tokens = tokens.to(target.device)
        _raw(target).index_copy_(1, tokens, _raw(values.to(target)))
        if feature.scale is not None and scale is not None:
            feature.scale.index_copy_(1, tokens, scale.to(feature.scale))

    def drop(self, feature: Feature) -> None:
        """Gives a feature up; its memory may serve the next one."""
        with self._alone():
            for tensor in (feature.data, feature.scale):
                if tensor is not None:
                    self._spare[_key(tensor)].append(tensor)

    def trim(self) -> None:
        """Frees spare memory, for when shapes have changed."""
        with self._alone():
            self.bytes -= sum(tensor.nbytes for spare in self._spare.values() for tensor in spare)
            self._spare.clear()

    def clear(self) -> None:
        """Forgets everything; features still held elsewhere are not to be used again."""
        with self._alone():
            self._spare.clear()
            self.bytes = 0

    def _alone(self) -> AbstractContextManager[Any]:
        """Around what threads must not do at the same time. torch.compile traces no locks; compiled models are called by one thread."""
        return nullcontext() if torch.compiler.is_compiling() else self._lock

    def _encode(self, tensor: Tensor) -> tuple[Tensor, Tensor | None]:
        if self.format.dtype is not _FP8 or not tensor.numel():
            return tensor.to(self.format.dtype or tensor.dtype), None
        scale = tensor.abs().amax(dim=-1, keepdim=True).float().clamp(min=1e-12) / _FP8_MAX
        return (tensor / scale).clamp(-_FP8_MAX, _FP8_MAX).to(_FP8), scale

    @staticmethod
    def _decode(data: Tensor, scale: Tensor | None, like: Tensor) -> Tensor:
        data = data.to(device=like.device, non_blocking=True)
        if scale is None:
            return data.to(like.dtype)
        return (data.to(torch.float32) * scale.to(device=like.device, non_blocking=True)).to(like.dtype)

    def _copy(self, tensor: Tensor) -> Tensor:
        device = self.format.device or tensor.device
        with self._alone():
            spare = self._spare.get((tuple(tensor.shape), tensor.dtype, device))
            target = spare.pop() if spare else self._allocate(tensor, device)
        return target.copy_(tensor, non_blocking=True)

    def _allocate(self, tensor: Tensor, device: torch.device) -> Tensor:
        # pinned memory lets the copy to system memory run behind the computation; same-stream order keeps it safe
        pinned = device.type == "cpu" and tensor.device.type == "cuda"
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=pinned)
        self.bytes += target.nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return target


def _key(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _raw(tensor: Tensor) -> Tensor:
    """fp8 has no index operations of its own; its bytes do."""
    return tensor.view(torch.uint8) if tensor.dtype is _FP8 else tensor

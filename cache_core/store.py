"""Keeps tensors between evaluations on a chosen device in a chosen precision, and counts their bytes."""

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
"""Returns a context around the allocation of what outlives a block, as some hosts record a block's allocations and expect them to be
freed at its end."""


class StoreFullError(Exception):
    """A device has no memory left for the cache: for a feature, for factors or for a proof."""


@contextmanager
def memory_ends() -> Iterator[None]:
    """Turns a lack of memory into StoreFullError, around what is done for the cache alone.

    The model can do without the cache.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise StoreFullError from error


@dataclass(frozen=True)
class StoreFormat:
    """How features are kept.

    Args:
        device: Device to keep them on, None for the one they come from.
        dtype: Dtype to keep them in, None for their own. With torch.float8_e4m3fn, each token has a scale.
    """

    device: torch.device | None = None
    dtype: torch.dtype | None = None

    def bytes_per_token(self, channels: int, dtype: torch.dtype) -> int:
        """Returns the bytes of one kept token that comes in `dtype`."""
        kept = self.dtype or dtype
        return channels * kept.itemsize + (4 if kept is _FP8 else 0)


@dataclass(eq=False)
class Feature:
    """One kept tensor (B, L, C), with a scale (B, L, 1) if it is kept in fp8. Its store owns it."""

    data: Tensor
    scale: Tensor | None = None


class FeatureStore:
    """Keeps copies of tensors, to which only it writes. Several threads may use it, each with features of its own.

    The memory of a dropped feature is reused for the next one of its shape, until `trim` or `clear`: a full history drops its oldest
    feature for each new one.

    Args:
        fmt: How features are kept.
        unrecorded: See `Unrecorded`.

    Attributes:
        format: The same as `fmt`; it may be changed while nothing is kept.
        bytes: Bytes of all memory held, spare memory included.
        peak_bytes: The most bytes so far.
    """

    def __init__(self, fmt: StoreFormat = StoreFormat(), unrecorded: Unrecorded = nullcontext) -> None:
        self.format = fmt
        self.bytes = 0
        self.peak_bytes = 0
        self.unrecorded = unrecorded
        self._lock = threading.Lock()
        self._spare: dict[tuple, list[Tensor]] = defaultdict(list)

    def put(self, tensor: Tensor) -> Feature:
        """Keeps a copy of `tensor` (B, L, C).

        Raises:
            StoreFullError: Where the device has no room for it.
        """
        with memory_ends(), self.unrecorded():
            values, scale = self._encode(tensor)
            return Feature(self._copy(values), self._copy(scale) if scale is not None else None)

    def load(self, feature: Feature, like: Tensor) -> Tensor:
        """Returns a feature in the dtype and on the device of `like`. Do not write to it: it may be the kept memory itself."""
        return self._decode(feature.data, feature.scale, like)

    def load_tokens(self, feature: Feature, tokens: Tensor, like: Tensor) -> Tensor:
        """Returns only the tokens with these indices, (B, len(tokens), C), in the dtype and on the device of `like`."""
        tokens = tokens.to(feature.data.device)
        scale = feature.scale[:, tokens] if feature.scale is not None else None
        return self._decode(_raw(feature.data)[:, tokens].view(feature.data.dtype), scale, like)

    def write_tokens(self, feature: Feature, tokens: Tensor, fresh: Tensor) -> None:
        """Overwrites the tokens of a feature with these indices with `fresh` (B, len(tokens), C)."""
        values, scale = self._encode(fresh)
        target = feature.data
        tokens = tokens.to(target.device)
        _raw(target).index_copy_(1, tokens, _raw(values.to(target)))
        if feature.scale is not None and scale is not None:
            feature.scale.index_copy_(1, tokens, scale.to(feature.scale))

    def drop(self, feature: Feature) -> None:
        """Drops a feature. Its memory may be reused for the next one."""
        with self._alone():
            for tensor in (feature.data, feature.scale):
                if tensor is not None:
                    self._spare[_key(tensor)].append(tensor)

    def trim(self) -> None:
        """Frees spare memory, after shapes have changed."""
        with self._alone():
            self.bytes -= sum(tensor.nbytes for spare in self._spare.values() for tensor in spare)
            self._spare.clear()

    def clear(self) -> None:
        """Forgets everything. Features that are still held elsewhere must not be used again."""
        with self._alone():
            self._spare.clear()
            self.bytes = 0

    def _alone(self) -> AbstractContextManager[Any]:
        """Returns a context for what threads must not do at the same time.

        torch.compile cannot trace locks, so there is none inside a compiled model, which only one thread calls.
        """
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
        # pinned memory lets the copy to system memory run beside the computation; the order of the stream keeps it safe
        pinned = device.type == "cpu" and tensor.device.type == "cuda"
        target = torch.empty(tensor.shape, dtype=tensor.dtype, device=device, pin_memory=pinned)
        self.bytes += target.nbytes
        self.peak_bytes = max(self.peak_bytes, self.bytes)
        return target


def _key(tensor: Tensor) -> tuple:
    return tuple(tensor.shape), tensor.dtype, tensor.device


def _raw(tensor: Tensor) -> Tensor:
    """Returns the bytes of an fp8 tensor, as fp8 has no index operations; any other tensor as it is."""
    return tensor.view(torch.uint8) if tensor.dtype is _FP8 else tensor

"""Multiply-adds of what runs, counted by torch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from types import MappingProxyType
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

_ATEN = torch.ops.aten


def _attention(query: Any, key: Any, value: Any, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(query, key, value)


def _int_mm(a: Any, b: Any, *_args: Any, **_kwargs: Any) -> int:
    return 2 * a[0] * a[1] * b[1]


def _linear(x: Any, weight: Any, *_args: Any, **_kwargs: Any) -> int:
    return 2 * prod(x) * weight[0]


# What torch's table lacks: attention on the CPU, int8 layers, and linear layers as a whole, which it would take apart into slower products.
_MORE = MappingProxyType(
    {
        _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
        _ATEN._int_mm: _int_mm,
        _ATEN.linear: _linear,
        _ATEN.linear.default: _linear,  # by this name it is looked up before it is taken apart
    }
)


class _Everywhere:
    """In place of the counter's own tracker of modules, which hooks every module of the process: only the sum is asked for."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *_error: object) -> None:
        pass


class Macs:
    """Multiply-adds since `counted` was entered: matrix products, convolutions and attention. Kernels that torch does not know count 0."""

    def __init__(self, mode: FlopCounterMode) -> None:
        self._mode = mode

    @property
    def so_far(self) -> float:
        return self._mode.get_total_flops() / 2


@contextmanager
def counted() -> Iterator[Macs]:
    """Counts what runs inside, in this thread. Costs some microseconds an operation, so it is for the first call of a kind."""
    mode = FlopCounterMode(display=False, custom_mapping=dict(_MORE))
    mode.mod_tracker = _Everywhere()  # type: ignore[assignment]
    with mode:
        yield Macs(mode)

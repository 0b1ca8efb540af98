"""Counts the multiply-adds of what torch runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_flop_count

_ATEN = torch.ops.aten


def _attention(query: Tensor, key: Tensor, value: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return sdpa_flop_count(query.shape, key.shape, value.shape)


def _int_mm(a: Tensor, b: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return 2 * a.numel() * b.shape[1]


def _linear(x: Tensor, weight: Tensor, *_args: Any, **_kwargs: Any) -> int:
    return 2 * x.numel() * weight.shape[0]


def _nothing(*_args: Any, **_kwargs: Any) -> int:
    return 0


# Composed of several operations, none of which is a product: to decompose them would take time and count nothing.
_WITHOUT_PRODUCTS = ("reshape", "flatten", "chunk", "contiguous", "expand_as", "to", "type_as", "layer_norm", "rms_norm")
# Missing from torch's table: attention on the CPU, int8 products, and linear layers as a whole, which it would decompose into slower ones.
_MORE = MappingProxyType(
    {
        _ATEN._scaled_dot_product_flash_attention_for_cpu: _attention,
        _ATEN._int_mm: _int_mm,
        _ATEN.linear: _linear,
        **{getattr(_ATEN, name): _nothing for name in _WITHOUT_PRODUCTS if hasattr(_ATEN, name)},
    }
)


class _Counting(TorchDispatchMode):
    """Counts as torch's `FlopCounterMode` does, but without sums per module: this takes about a quarter of its time per operation."""

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0
        self._how: dict[int, Callable[..., int] | None] = {}  # by the id of an operation, None for one that counts nothing
        self._registry = {**flop_registry, **_MORE}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not isinstance(func, OpOverload):  # higher-order operators such as torch.cond, which a mode must leave to torch
            return NotImplemented
        if id(func) not in self._how:
            count = self._registry.get(func.overloadpacket)
            if count is None:
                with self:  # inference mode passes composite operations on undecomposed
                    result = func.decompose(*args, **kwargs)
                if result is not NotImplemented:
                    return result
            self._how[id(func)] = count
        result, count = func(*args, **kwargs), self._how[id(func)]
        if count is not None:
            self.flops += count(*args, **kwargs, out_val=result)
        return result


class Macs:
    """Gives the multiply-adds since `counted` was entered.

    Matrix products, convolutions and attention are counted. Kernels that torch does not know count 0.
    """

    def __init__(self, mode: _Counting) -> None:
        self._mode = mode

    @property
    def so_far(self) -> float:
        return self._mode.flops / 2


@contextmanager
def counted() -> Iterator[Macs]:
    """Counts the multiply-adds of what this thread runs inside the context.

    It costs some microseconds per operation, so it is meant for the first call of a kind.
    """
    with _Counting() as mode:
        yield Macs(mode)

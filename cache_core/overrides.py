"""Puts other `forward` functions on modules for the length of one model call.

Modules are never replaced: parameter names, and with them LoRA keys, stay as they are, and whoever wrapped a
forward before us is called as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]
Override = tuple[nn.Module, Callable[[Forward], Forward]]  # a module and what makes its new forward from its present one
_ABSENT = object()


@contextmanager
def forward_overrides(overrides: Iterable[Override]) -> Iterator[None]:
    """Applies the overrides in order (a later one on the same module wraps an earlier) and always undoes them."""
    undo: list[tuple[nn.Module, Any]] = []
    try:
        for module, make in overrides:
            before = module.__dict__.get("forward", _ABSENT)
            forward = make(module.forward)
            undo.append((module, before))
            module.__dict__["forward"] = forward
        yield
    finally:
        for module, before in reversed(undo):
            if before is _ABSENT:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


def uncompiled() -> AbstractContextManager[None]:
    """Compiled blocks run as they were written, for overrides inside them.

    torch.compile would trace those of every layer anew at each call: on the demo model a minute and a half for the
    250 graphs of a run. Where nothing was compiled, or torch is older than 2.6, there is nothing to do.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    is_compiled = "torch._dynamo" in sys.modules  # loaded by the first torch.compile
    return set_stance("force_eager") if is_compiled and set_stance is not None else nullcontext()


def around(before: Callable[[tuple, dict], None] | None = None, after: Callable[[Any], None] | None = None) -> Callable[[Forward], Forward]:
    """An override that runs the present forward and tells `before` its arguments and `after` its result."""

    def make(forward: Forward) -> Forward:
        def listened(*args: Any, **kwargs: Any) -> Any:
            if before is not None:
                before(args, kwargs)
            result = forward(*args, **kwargs)
            if after is not None:
                after(result)
            return result

        return listened

    return make

"""Overrides the `forward` functions of modules for the length of one model call.

Modules are never replaced. So parameter names, and with them LoRA keys, stay as they are, and a forward that another
node has wrapped is called as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

Forward = Callable[..., Any]
Override = tuple[nn.Module, Callable[[Forward], Forward]]  # a module, and a function from its present forward to the new one
_ABSENT = object()


@contextmanager
def forward_overrides(overrides: Iterable[Override]) -> Iterator[None]:
    """Applies the overrides in order and always undoes them. A later one on the same module wraps an earlier one."""
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
    """Returns a context in which compiled blocks run uncompiled, for overrides inside them.

    torch.compile would trace the overrides of every layer anew at each call: on the demo model this takes a minute and a
    half for the 250 graphs of a run. Where nothing was compiled, or torch is older than 2.6, the context does nothing.
    """
    set_stance = getattr(torch.compiler, "set_stance", None)
    is_compiled = "torch._dynamo" in sys.modules  # imported by the first torch.compile
    return set_stance("force_eager") if is_compiled and set_stance is not None else nullcontext()


def around(before: Callable[[tuple, dict], None] | None = None, after: Callable[[Any], None] | None = None) -> Callable[[Forward], Forward]:
    """Returns the second part of an `Override`, which lets the present forward run and listens to it.

    Args:
        before: Is called with the arguments (args, kwargs) before the forward runs. None for nothing.
        after: Is called with the result. None for nothing.
    """

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

"""Hands a call of the model to a run, with a description of the call and a function that computes it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ...cache_core import Kind, ModelCall
from ...cache_core.blocks import unwrapped
from ...cache_core.discovery.trees import tensors
from . import recording
from .network_options import variant_of


def carry_out(run: Any, options: dict, executor: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    """Answers one APPLY_MODEL call with a run.

    Args:
        run: The run.
        options: The transformer options among the arguments.
        executor: The host's, which computes the call.
        x: First argument of the call, the latent; the others follow.
    """
    call = _describe(executor.class_obj, x, options, _shapes(args, kwargs))

    def compute() -> torch.Tensor:
        own = {name: _own(value) if name == "control" else value for name, value in kwargs.items()}
        return executor(x, *(arg if arg is options else _own(arg) for arg in args), **own)

    return run.model_call(call, compute)


def _own(given: Any) -> Any:
    """Copies the lists of a ControlNet's residuals, as some networks take residuals off them, and a call may be made more than once.

    Some hosts pass the residuals by name, others by position.
    """
    if not isinstance(given, dict):
        return given
    return {name: list(item) if isinstance(item, list) else item for name, item in given.items()}


def _describe(base_model: Any, x: torch.Tensor, options: dict, given: Hashable) -> ModelCall:
    """Describes an APPLY_MODEL call to the run."""
    network, patcher = unwrapped(base_model.diffusion_model), base_model.current_patcher
    uuids = options.get("uuids") or ()
    conds = tuple(zip(options.get("cond_or_uncond", ()), uuids))
    bypass, rows = "", 0
    if not conds or x.shape[0] % len(conds):
        bypass, conds = "a call that does not say which conditioning it is for", ()
    elif options.get("context_window") is not None:
        bypass = "context windows"
    else:
        rows = x.shape[0] // len(conds)
    return ModelCall(
        network,
        conds,
        signature=(rows, x.shape[1:], x.dtype, x.device),
        variant=variant_of(options),
        given=given,
        bypass=bypass,
        weights=_hook_weights(patcher),
        is_copy=getattr(patcher, "is_multigpu_base_clone", False),
        starting=lambda kind: recording.note_skip(options, kind is Kind.SKIPPED),
        abandoned=recording.abandoned,
    )


def _shapes(args: tuple, kwargs: dict[str, Any]) -> Hashable:
    """Returns the shapes of the conditioning. A ControlNet's residuals are left out: they come and go, and change no number of tokens."""
    given = {name: value for name, value in kwargs.items() if name not in ("control", "transformer_options")}
    positional = [value for value in args if isinstance(value, torch.Tensor)]
    return tuple((path, tensor.shape) for path, tensor in tensors((positional, given)))


def _hook_weights(patcher: Any) -> tuple:
    """Returns which hook weights (scheduled LoRAs) are applied, and how strongly. Features are of no use after they change."""
    group = getattr(patcher, "current_hooks", None)
    return tuple((id(hook), float(getattr(hook, "strength", 1.0))) for hook in group.hooks) if group is not None else ()

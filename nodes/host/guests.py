"""Caches a model that the guider of another model runs, as DualModelGuider runs its unconditional model.

The host calls the OUTER_SAMPLE wrappers of the guider's own model only. For the other model, it calls back when its pass in an evaluation
begins, and when it is cleaned up at the end. Which sampler is used is not known there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP

from . import recording
from .keys import KEY, RUN, options_with

CALLBACKS = (CallbacksMP.ON_PREPARE_STATE, CallbacksMP.ON_CLEANUP)


class Guest:
    """Opens a run at the first pass and an evaluation at every pass, and ends both.

    Args:
        open_run: Is called with the patcher and the noise levels, and returns a run or None.
        finished: Is called with the run at its end, and with whether it came to the last step.
        carry_out: Answers one APPLY_MODEL call. It gets the run, the transformer options, the host's executor and its arguments.
    """

    def __init__(
        self,
        open_run: Callable[[ModelPatcher, torch.Tensor], Any],
        finished: Callable[[Any, bool], None],
        carry_out: Callable[..., torch.Tensor],
    ) -> None:
        self._open_run, self._finished, self._carry_out = open_run, finished, carry_out
        self._run: Any = None
        self._network: Any = None
        self._evaluation = ExitStack()
        self._is_last = False

    def add_to(self, model: ModelPatcher) -> None:
        model.add_callback_with_key(CallbacksMP.ON_PREPARE_STATE, KEY, self._prepare_state)
        model.add_callback_with_key(CallbacksMP.ON_CLEANUP, KEY, self._clean_up)

    def _prepare_state(self, patcher: ModelPatcher, timestep: torch.Tensor, model_options: dict[str, Any] | None = None) -> None:
        """Is the host's callback before every pass of the model. Hosts that pass no options have no guider of two models."""
        options = (model_options or {}).get("transformer_options", {})
        sigmas = options.get("sample_sigmas")
        if RUN in options or sigmas is None:  # the guider's own model is cached, and its run is used for this model too
            return
        if self._network is None:
            self._run, self._network = self._open_run(patcher, sigmas), patcher.model
        if self._run is None:
            return
        self._evaluation.close()
        self._evaluation.enter_context(self._run.evaluation(float(timestep.flatten()[0])))
        self._is_last = bool((sigmas[:-1] >= timestep.flatten()[0].to(sigmas)).all())
        self._run.cond_batch()
        wrappers = options.setdefault("wrappers", {})
        for kind, wrapper in ((WrappersMP.APPLY_MODEL, self._apply_model), (WrappersMP.DIFFUSION_MODEL, recording.diffusion_model)):
            wrappers.setdefault(kind, {})[KEY] = [wrapper]

    def _apply_model(self, executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Is the APPLY_MODEL wrapper. It is among the guider's options, so it is called for the other model too."""
        options = options_with("uuids", args, kwargs)
        if self._run is None or options is None or executor.class_obj is not self._network:
            return executor(x, t, *args, **kwargs)
        return self._carry_out(self._run, options, executor, x, t, *args, **kwargs)

    def _clean_up(self, _patcher: ModelPatcher) -> None:
        run, self._run, self._network = self._run, None, None
        if run is None:
            return
        self._evaluation.close()
        self._finished(run, self._is_last)

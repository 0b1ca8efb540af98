"""Makes every sampling of a MODEL go through a run of ours, by wrappers that ComfyUI calls.

OUTER_SAMPLE begins and ends the run, PREDICT_NOISE is one evaluation, CALC_COND_BATCH separates the sampler's own pass over the conds
from extra ones, APPLY_MODEL is one call of the model. The wrappers are on a clone of the model: nothing stays on the model itself after a
call.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import comfy.model_patcher
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import WrappersMP

from ...cache_core import CacheRun
from . import guests, recording
from .keys import KEY, RUN, options_with
from .model_calls import carry_out

OpenRun = Callable[[ModelPatcher, torch.Tensor, Any], Any]


def listen(model: ModelPatcher, open_run: OpenRun, finished: Callable[[Any, Any], None]) -> None:
    """Makes every sampling of `model` go through a run.

    Args:
        model: The model, which gets the wrappers.
        open_run: Is called with the patcher, the noise levels and the host's sampler when a sampling begins. It returns a run or None. A
            run has `evaluation`, `corrected`, `cond_batch` and `model_call`, as `cache_core.CacheRun` has.
        finished: Is called with the run at its end, and with the final latent, None after a cancel or an error.
    """
    model.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, _sampling(open_run, finished))
    for kind, wrapper in _DURING_A_RUN.items():
        model.add_wrapper_with_key(kind, KEY, wrapper)


def detach(model: ModelPatcher) -> ModelPatcher:
    """Returns a clone without a cache of ours."""
    clone = model.clone()
    if clone.get_attachment(KEY) is not None:
        logging.info("[DuCa] this model already had a DuCa Cache; the later node replaces it")
        clone.remove_attachments(KEY)
    for wrapper in (WrappersMP.OUTER_SAMPLE, *_DURING_A_RUN):
        clone.remove_wrappers_with_key(wrapper, KEY)
    for callback in guests.CALLBACKS:
        clone.remove_callbacks_with_key(callback, KEY)
    return clone


def _sampling(open_run: OpenRun, finished: Callable[[Any, Any], None]) -> Callable[..., torch.Tensor]:
    """Returns the OUTER_SAMPLE wrapper. It opens one run per sampling and ends it, however the sampling ends."""

    def outer_sample(executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: torch.Tensor, *args: Any, **kwargs: Any):
        guider = executor.class_obj
        run = open_run(guider.model_patcher, sigmas, sampler)
        shared_options = guider.model_options
        guider.model_options = comfy.model_patcher.create_model_options_clone(shared_options)
        guider.model_options.setdefault("transformer_options", {})[RUN] = run  # also None, which says that this sampling goes without one
        result = None
        try:
            result = executor(noise, latent, sampler, sigmas, *args, **kwargs)
            return result
        finally:
            guider.model_options = shared_options
            if run is not None:
                finished(run, result)

    return outer_sample


def _predict_noise(executor: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: dict = {}, seed: Any = None):  # noqa: B006
    run: CacheRun | None = model_options.get("transformer_options", {}).get(RUN)
    if run is None:
        return executor(x, timestep, model_options, seed)
    # The noise level is read here, as the kind depends on it. On a GPU this waits for the previous evaluation.
    with run.evaluation(float(timestep.flatten()[0])):
        denoised = executor(x, timestep, model_options, seed)
    return run.corrected(x, denoised)


def _calc_cond_batch(executor: Any, model: Any, conds: Any, x_in: torch.Tensor, timestep: torch.Tensor, model_options: dict):
    run: CacheRun | None = model_options.get("transformer_options", {}).get(RUN)
    if run is not None:
        run.cond_batch()
    return executor(model, conds, x_in, timestep, model_options)


def _apply_model(executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    options = options_with(RUN, args, kwargs)
    if options is None:
        return executor(x, t, *args, **kwargs)
    return carry_out(options[RUN], options, executor, x, t, *args, **kwargs)


_DURING_A_RUN = {
    WrappersMP.PREDICT_NOISE: _predict_noise,
    WrappersMP.CALC_COND_BATCH: _calc_cond_batch,
    WrappersMP.APPLY_MODEL: _apply_model,
    WrappersMP.DIFFUSION_MODEL: recording.diffusion_model,
}

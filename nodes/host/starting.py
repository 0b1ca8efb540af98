"""Works out what a run begins with: the network and its family, the noise levels, and how the sampler steps."""

from __future__ import annotations

from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...cache_core import Places, RunStart, Timeline, find_family
from . import recording, samplers

# What was found out about every network that was sampled, kept as long as the network lives. `bookkeeping`: attributes by which the host
# notes where weights are and what was fetched (comfy/model_prefetch.py and comfy/ops.py of Comfy-Org/ComfyUI).
_places = Places(bookkeeping=("_v", "_prefetch", "_comfy_graph", "_pin", "weight_", "bias_", "comfy_"))


def run_start(patcher: ModelPatcher, sigmas: torch.Tensor, sampler: Any, skip_from: float = 0.0, skip_to: float = 1.0) -> RunStart:
    """Returns what is known when a run begins.

    Args:
        patcher: The model.
        sigmas: The sampler's noise levels (steps + 1,).
        sampler: The host's sampler object. None where it is not known: it is then taken to add no noise and to be no Euler sampler.
        skip_from, skip_to: The part 0..1 of the sampling in which evaluations may be skipped.

    Raises:
        ValueError: If the cache cannot be used for the model or its noise levels, with a message for the user.
    """
    check_transformer(patcher)
    sampling = patcher.get_model_object("model_sampling")
    timeline = Timeline(sigmas.tolist(), model_times(sampling, sigmas))
    window = timeline.window(float(sampling.percent_to_sigma(skip_from)), float(sampling.percent_to_sigma(skip_to)))
    adds_noise = samplers.adds_noise(sampling, sampler, sigmas) if sampler is not None else False
    return RunStart(
        patcher.model.diffusion_model,
        find_family(patcher.model.diffusion_model),
        timeline,
        window,
        patcher.load_device,
        samplers.is_euler(sampler),
        adds_noise,
        recording.unrecorded,
        _places,
    )


def check_transformer(model: ModelPatcher, asker: str = "DuCa Cache") -> None:
    """Refuses a UNet, whose blocks change the size of the picture and whose later blocks use results of earlier ones.

    Args:
        model: The model.
        asker: Name of the node, for the message.

    Raises:
        ValueError: For a UNet, with a message for the user.
    """
    network = model.model.diffusion_model
    if all(hasattr(network, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        raise ValueError(f"{asker} is for diffusion transformers; {type(network).__name__} is a UNet")


def model_times(sampling: Any, sigmas: torch.Tensor) -> list[float]:
    """Returns the model's time at each noise level, scaled so that the noisiest is 1."""
    levels = torch.cat((torch.as_tensor(sampling.sigma_max).reshape(1).to(sigmas), sigmas))
    times = sampling.timestep(levels).float().cpu()
    return (times[1:] / times[0]).tolist()

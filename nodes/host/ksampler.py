"""Samples and decodes as the host's own KSampler and VAE Decode do, for nodes that sample a model."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher


def ksample(
    model: ModelPatcher,
    positive: Any,
    negative: Any,
    latent: dict[str, Any],
    *,
    seed: int,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    denoise: float = 1.0,
    on_step: Callable[[int, int], None] = lambda done, total: None,
) -> Any:
    """Samples as KSampler does with its inputs of the same names.

    Args:
        on_step: Is called after each step with the numbers of steps that are done, and of all steps.

    Returns:
        The final latent on the CPU: a tensor, or several as one (a video with sound).
    """
    start = fitted(model, latent)
    noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler_name, scheduler, positive, negative, start, denoise=denoise,
        noise_mask=latent.get("noise_mask"), callback=lambda step, x0, x, total: on_step(step + 1, total), disable_pbar=True, seed=seed,
    ).to("cpu")  # which waits for the device  # fmt: skip


def fitted(model: ModelPatcher, latent: dict[str, Any]) -> Any:
    """Returns the latent that sampling starts from: a tensor, or several as one. An empty latent gets the channels of `model`.

    Newer hosts also scale it, by the number of pixels per element that the node that made it has noted beside it.
    """
    notes = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **{name: latent[name] for name in notes if name in latent})


def decoded(vae: Any, samples: Any) -> torch.Tensor:
    """Decodes a latent into pictures (N, H, W, C). Frames of a video are pictures too; its sound is left out."""
    return vae.decode(samples.unbind()[0] if samples.is_nested else samples).flatten(0, -4)

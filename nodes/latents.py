"""Latents as the host's own KSampler and VAE Decode take them, for nodes that sample by themselves."""

from __future__ import annotations

import inspect
from typing import Any

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher


def fitted(model: ModelPatcher, latent: dict[str, Any]) -> Any:
    """What sampling starts from: a tensor, or several as one. An empty latent is given the channels that `model` has.

    Newer hosts also scale it, by what the node that made it has noted beside it: how many pixels it took for one element.
    """
    notes = inspect.signature(comfy.sample.fix_empty_latent_channels).parameters
    return comfy.sample.fix_empty_latent_channels(model, latent["samples"], **{name: latent[name] for name in notes if name in latent})


def decoded(vae: Any, samples: Any) -> torch.Tensor:
    """Pictures (N, H, W, C); a video's frames are pictures too, and its sound is left out."""
    return vae.decode(samples.unbind()[0] if samples.is_nested else samples).flatten(0, -4)

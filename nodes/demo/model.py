"""Loads the demo model, a FLUX of 13 M parameters, and encodes its prompts."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import ClassVar

import comfy.latent_formats
import comfy.model_detection
import comfy.model_management
import comfy.supported_models
import safetensors
import safetensors.torch
import torch
from comfy.model_patcher import ModelPatcher

from ...demo.emoji_text import encode

_WEIGHTS = Path(__file__).parents[2] / "demo" / "emoji_flux_48.safetensors"


class _DemoConfig(comfy.supported_models.Flux):
    """The host's FLUX with the demo's latents (pixels in -1..1) and shift of the noise levels (sigma' = 1.8 sigma / (1 + 0.8 sigma))."""

    latent_format = comfy.latent_formats.ChromaRadiance
    sampling_settings: ClassVar = {"shift": math.log(1.8)}


def load_demo_model(weight_dtype: torch.dtype = torch.float32) -> ModelPatcher:
    """Loads the demo model with the host's own detection, key names, Flux, sampling and patcher classes. It computes in float32.

    Args:
        weight_dtype: Dtype of the weights. Other than float32 the host casts them layer by layer, as with fp8 checkpoints.
    """
    weights = safetensors.torch.load_file(_WEIGHTS)
    with safetensors.safe_open(_WEIGHTS, "pt") as file:
        own_sizes = json.loads(file.metadata()["flux_config"])
    # detection knows which fields this host's Flux asks for; the file gives the sizes that detection takes to be those of every Flux
    config = _DemoConfig({**comfy.model_detection.detect_unet_config(weights, ""), **own_sizes})
    config.set_inference_dtype(weight_dtype, None if weight_dtype is torch.float32 else torch.float32)
    offload_device = comfy.model_management.unet_offload_device()
    model = config.get_model({}, "", device=offload_device)
    weights = config.process_unet_state_dict(weights)
    model.diffusion_model.load_state_dict({key: value.to(weight_dtype) for key, value in weights.items()})
    patcher = ModelPatcher(model, load_device=comfy.model_management.get_torch_device(), offload_device=offload_device)
    patcher.cached_patcher_init = (load_demo_model, (weight_dtype,))  # hosts that split guidance over several GPUs load a copy
    return patcher


def encode_prompt(text: str) -> list:
    """Returns the host's conditioning for a prompt: context (1, 12, 64) and pooled vector (1, 64)."""
    context, pooled = encode(text)
    return [[torch.from_numpy(context)[None], {"pooled_output": torch.from_numpy(pooled)[None]}]]

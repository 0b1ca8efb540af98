"""Makes networks of the host that are no diffusion transformers."""

from __future__ import annotations

import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher


def patcher(config) -> ModelPatcher:
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def unet() -> ModelPatcher:
    """Returns the host's UNet as SD 1.5 configures it, but narrow."""
    return patcher(
        comfy.supported_models.SD15(
            {
                "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
                "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True, "transformer_depth": [1, 1],
                "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 64,
                "use_linear_in_transformer": False, "adm_in_channels": None, "legacy": False,
            }
        )
    )  # fmt: skip

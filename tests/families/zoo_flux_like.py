"""Makes small models of FLUX's blocks: HunyuanVideo and its kin, Chroma, FLUX.2, Hunyuan3D."""

from __future__ import annotations

from typing import Any

import comfy.sd
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from making import Case, text, tiny

_HUNYUAN = {
    "image_model": "hunyuan_video", "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 24, "hidden_size": 128,
    "mlp_ratio": 4.0, "num_heads": 1, "depth": 2, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 256, "patch_size": [1, 2, 2],
    "qkv_bias": True, "guidance_embed": True, "byt5": False, "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None,
}  # fmt: skip
_CHROMA = {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "context_in_dim": 24, "hidden_size": 48, "mlp_ratio": 4.0,
    "num_heads": 2, "depth": 2, "depth_single_blocks": 2, "axes_dim": [4, 10, 10], "theta": 10000, "patch_size": 2, "qkv_bias": True,
    "in_dim": 64, "out_dim": 48, "hidden_dim": 40, "n_layers": 2,
}  # fmt: skip


def hunyuan_video(config: type = comfy.supported_models.HunyuanVideo, **more: Any) -> ModelPatcher:
    return tiny(config, **(_HUNYUAN | more))


def chroma() -> ModelPatcher:
    return tiny(comfy.supported_models.Chroma, **_CHROMA)


def chroma_radiance(**more: Any) -> ModelPatcher:
    nerf = {
        "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 4, "nerf_hidden_size": 8, "nerf_mlp_ratio": 2,
        "nerf_depth": 2, "nerf_max_freqs": 4, "nerf_tile_size": 512, "nerf_final_head_type": "conv", "nerf_embedder_dtype": torch.float32,
    }  # fmt: skip
    return tiny(comfy.supported_models.ChromaRadiance, **(_CHROMA | nerf | more))


def flux2(**more: Any) -> ModelPatcher:
    sizes = {
        "image_model": "flux2", "in_channels": 128, "out_channels": 128, "vec_in_dim": None, "context_in_dim": 24, "hidden_size": 32,
        "mlp_ratio": 3.0, "num_heads": 2, "depth": 1, "depth_single_blocks": 2, "axes_dim": [4, 4, 4, 4], "theta": 2000, "patch_size": 1,
        "qkv_bias": False, "guidance_embed": True, "global_modulation": True, "mlp_silu_act": True, "ops_bias": False,
        "default_ref_method": "index", "ref_index_scale": 10.0,
    }  # fmt: skip
    return tiny(comfy.supported_models.Flux2, **(sizes | more))


def hunyuan3d() -> ModelPatcher:
    return tiny(
        comfy.supported_models.Hunyuan3Dv2, image_model="hunyuan3d2", in_channels=64, context_in_dim=24, hidden_size=64, mlp_ratio=4.0,
        num_heads=16, depth=2, depth_single_blocks=2, qkv_bias=True, guidance_embed=False,
    )  # fmt: skip


def loaded(model: ModelPatcher) -> ModelPatcher:
    """Loads the same weights through the host's loader, which finds the dimensions itself."""
    return comfy.sd.load_diffusion_model_state_dict(model.model.diffusion_model.state_dict())


def _last(model: Any) -> torch.nn.Module:
    return model.single_blocks[-1]


CASES = (
    Case("hunyuan_video", lambda: loaded(hunyuan_video()), (16, 3, 8, 6), text(7, 24, pooled_output=torch.ones(1, 768)), _last),
    Case("chroma", chroma, (16, 12, 16), text(7, 24, pooled_output=torch.ones(1, 8)), _last),
    Case("chroma_radiance", chroma_radiance, (3, 24, 32), text(7, 24, pooled_output=torch.ones(1, 8)), _last),
    Case("flux2", flux2, (128, 4, 6), text(7, 24, pooled_output=torch.ones(1, 8)), _last),
    Case("hunyuan3d", lambda: loaded(hunyuan3d()), (64, 24), text(9, 24), _last),
)

"""Makes small models that no file describes, of this host's classes. A new model costs no more than an entry here."""

from __future__ import annotations

from typing import Any

import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from making import Case, text, tiny
from zoo_image import normal
from zoo_video import WAN_LATENT, seeded


def _config(name: str) -> Any:
    return getattr(comfy.supported_models, name)


def _of_any_size(name: str) -> Any:
    """Returns a config that keeps the given sizes, where the host's own replaces some of them."""
    return type(name, (_config(name),), {"unet_extra_config": {}})


def mage_flow() -> ModelPatcher:
    return tiny(
        _config("MageFlow"), image_model="mage_flow", num_layers=3, attention_head_dim=16, num_attention_heads=3, joint_attention_dim=24,
        axes_dims_rope=(4, 6, 6),
    )  # fmt: skip


def z_image_pixels() -> ModelPatcher:
    return tiny(
        _config("ZImagePixelSpace"), image_model="zimage_pixel", in_channels=3, patch_size=8, dim=256, n_layers=2, n_refiner_layers=1,
        n_heads=4, multiple_of=32, ffn_dim_multiplier=0.25, qk_norm=True, cap_feat_dim=24, axes_dims=(16, 24, 24), axes_lens=(30, 32, 32),
        z_image_modulation=True, time_scale=1000.0, pad_tokens_multiple=32, decoder_hidden_size=32, decoder_num_res_blocks=2,
    )  # fmt: skip


def lens() -> ModelPatcher:
    return tiny(
        _config("Lens"), image_model="lens", num_layers=3, attention_head_dim=16, num_attention_heads=3, enc_hidden_dim=12,
        axes_dims_rope=(4, 6, 6), selected_layer_index=(0, 1),
    )  # fmt: skip


def joy_image() -> ModelPatcher:
    return tiny(
        _of_any_size("JoyImage"), image_model="joyimage", hidden_size=48, num_attention_heads=3, text_dim=24, num_layers=3,
        rope_dim_list=[4, 6, 6],
    )  # fmt: skip


def krea2() -> ModelPatcher:
    return tiny(
        _config("Krea2"), image_model="krea2", features=64, tdim=32, txtdim=24, heads=2, kvheads=1, multiplier=2, layers=3, txtlayers=2,
        txtheads=2, txtkvheads=2,
    )  # fmt: skip


def boogu() -> ModelPatcher:
    return tiny(
        _config("Boogu"), image_model="boogu", hidden_size=48, num_layers=2, num_double_stream_layers=2, num_refiner_layers=1,
        num_attention_heads=4, num_kv_heads=2, multiple_of=32, axes_dim_rope=(4, 4, 4), axes_lens=(30, 32, 32), instruction_feat_dim=24,
    )  # fmt: skip


def ideogram4() -> ModelPatcher:
    return tiny(
        _of_any_size("Ideogram4"), image_model="ideogram4", num_layers=3, num_attention_heads=2, attention_head_dim=32,
        intermediate_size=96, adaln_dim=32, llm_features_dim=24, rope_theta=10000, mrope_section=(4, 6, 6),
    )  # fmt: skip


def pixel_dit() -> ModelPatcher:
    return tiny(
        _config("PixelDiTT2I"), image_model="pixeldit_t2i", num_groups=2, hidden_size=48, pixel_hidden_size=8, pixel_attn_hidden_size=8,
        pixel_num_groups=2, patch_depth=6, pixel_depth=1, txt_embed_dim=24, txt_max_length=8,
    )  # fmt: skip


def scail() -> ModelPatcher:
    return tiny(
        _config("WAN21_SCAIL"), image_model="wan2.1", model_type="scail", out_dim=16, dim=48, num_heads=2, freq_dim=32, ffn_dim=96,
        text_dim=24, num_layers=3, in_dim=20,
    )  # fmt: skip


_BOOGU_COND = text(7, 24, attention_mask=torch.ones(1, 7, dtype=torch.long), reference_latents=[normal(3, 1, 16, 8, 6)])
_SCAIL_COND = text(7, 24, reference_latents=[seeded(1, 16, 1, 8, 6)], pose_video_latent=seeded(1, 16, 3, 4, 3))
_ALL = {
    "MageFlow": Case("mage_flow", mage_flow, (128, 6, 8), text(7, 24), lambda m: m.transformer_blocks[-1]),
    "ZImagePixelSpace": Case("zimage_pixel", z_image_pixels, (3, 48, 64), text(7, 24), lambda m: m.layers[-1]),
    "Lens": Case("lens", lens, (128, 6, 8), text(7, 24), lambda m: m.transformer_blocks[-1]),
    "JoyImage": Case("joyimage", joy_image, (16, 1, 12, 16), text(7, 24), lambda m: m.double_blocks[-1]),
    "Krea2": Case("krea2", krea2, (16, 1, 12, 16), text(7, 48), lambda m: m.blocks[-1]),
    "Boogu": Case("boogu", boogu, (16, 12, 16), _BOOGU_COND, lambda m: m.single_stream_layers[-1]),
    "Ideogram4": Case("ideogram4", ideogram4, (128, 6, 8), text(7, 24), lambda m: m.layers[-1]),
    "PixelDiTT2I": Case("pixeldit", pixel_dit, (3, 64, 96), text(7, 24), lambda m: m.pixel_blocks[-1]),
    "WAN21_SCAIL": Case("scail", scail, WAN_LATENT, _SCAIL_COND, lambda m: m.blocks[-1]),
}
CASES = tuple(case for name, case in _ALL.items() if hasattr(comfy.supported_models, name))

"""Makes small video and audio models."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import comfy.ldm.ace.model
import comfy.ldm.audio.embedders
import comfy.ldm.genmo.joint_model.asymm_models_joint
import comfy.ldm.wan.model
import comfy.ldm.wan.model_animate
import comfy.model_base
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from making import Case, text, tiny

WAN_LATENT = (16, 3, 8, 6)


def smaller(module: Any, name: str, **sizes: int) -> AbstractContextManager[Any]:
    """Replaces, while models are made, a class of the host by one with other sizes than those that are hard-coded where it is used."""
    original = getattr(module, name)
    return patch.object(module, name, lambda *args, **kwargs: original(*args, **kwargs | sizes))


def wan_model(config: type, model_type: str, **more: Any) -> ModelPatcher:
    unet = {"image_model": "wan2.1", "model_type": model_type, "in_dim": 16, "out_dim": 16, "freq_dim": 32, "text_dim": 24}
    unet |= {"dim": 48, "num_heads": 2, "ffn_dim": 96, "num_layers": 3}
    return tiny(config, **(unet | more))


def clip_picture(tokens: int = 5) -> Any:
    """Returns what a CLIP vision node gives."""
    return SimpleNamespace(penultimate_hidden_states=torch.randn(1, tokens, 1280, generator=torch.Generator().manual_seed(3)))


def seeded(*shape: int, seed: int = 4) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def wan_case(name: str, make: Callable[[], ModelPatcher], **cond: Any) -> Case:
    return Case(name, make, WAN_LATENT, text(7, 24, **cond), lambda m: m.blocks[-1])


def wan_t2v() -> ModelPatcher:
    return wan_model(comfy.supported_models.WAN21_T2V, "t2v")


def wan_i2v() -> ModelPatcher:
    return wan_model(comfy.supported_models.WAN21_I2V, "i2v", in_dim=36)


def wan_vace() -> ModelPatcher:
    return wan_model(comfy.supported_models.WAN21_Vace, "vace", num_layers=4, vace_layers=2, vace_in_dim=96)


def wan_animate() -> ModelPatcher:
    """Makes a model without the encoder of faces, whose size is fixed."""
    with patch.object(comfy.ldm.wan.model_animate, "Generator", lambda **_sizes: torch.nn.Identity()):
        return wan_model(comfy.supported_models.WAN22_Animate, "animate", in_dim=36, num_layers=5)


def wan_s2v() -> ModelPatcher:
    return wan_model(comfy.supported_models.WAN22_S2V, "s2v", audio_dim=8, audio_inject_layers=[0, 2])


def wan_humo() -> ModelPatcher:
    with smaller(comfy.ldm.wan.model, "AudioProjModel", channels=8, intermediate_dim=16):
        return wan_model(comfy.supported_models.WAN21_HuMo, "humo")


def ltxv(**more: Any) -> ModelPatcher:
    return tiny(
        comfy.supported_models.LTXV, image_model="ltxv", cross_attention_dim=48, attention_head_dim=12, num_attention_heads=4,
        caption_channels=24, num_layers=3, **more,
    )  # fmt: skip


def _ltxv() -> Case:
    mask = (torch.arange(7) < 5).int()[None]
    return Case("ltxv", ltxv, (128, 2, 4, 3), text(7, 24, attention_mask=mask), lambda m: m.transformer_blocks[-1])


def _cosmos() -> ModelPatcher:
    return tiny(
        comfy.supported_models.CosmosT2V, image_model="cosmos", max_img_h=24, max_img_w=24, max_frames=16, in_channels=16, out_channels=16,
        patch_spatial=2, patch_temporal=1, model_channels=48, num_blocks=3, num_heads=2, crossattn_emb_channels=24, pos_emb_cls="rope3d",
        block_x_format="THWBD", affline_emb_norm=True, use_adaln_lora=True, adaln_lora_dim=8, extra_per_block_abs_pos_emb=True,
        extra_per_block_abs_pos_emb_type="learnable",
    )  # fmt: skip


def cosmos_predict2() -> ModelPatcher:
    return tiny(
        comfy.supported_models.CosmosT2IPredict2, image_model="cosmos_predict2", max_img_h=240, max_img_w=240, max_frames=128,
        in_channels=16, out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=48, num_blocks=3, num_heads=2,
        crossattn_emb_channels=24, pos_emb_cls="rope3d", pos_emb_learnable=True, use_adaln_lora=True, adaln_lora_dim=8,
    )  # fmt: skip


def _mochi() -> Case:
    def make() -> ModelPatcher:
        with smaller(comfy.ldm.genmo.joint_model.asymm_models_joint, "FeedForward", hidden_size=96, multiple_of=32):
            return tiny(
                comfy.supported_models.GenmoMochi, image_model="mochi_preview", in_channels=12, hidden_size_x=48, hidden_size_y=24, depth=2,
                num_heads=2, mlp_ratio_x=256.0, learn_sigma=False, use_t5=True, t5_feat_dim=24, t5_token_length=7, qk_norm=True,
                qkv_bias=False,
            )  # fmt: skip

    mask = (torch.arange(7) < 5).int()[None]
    return Case("mochi", make, (12, 2, 4, 6), text(7, 24, attention_mask=mask), lambda m: m.blocks[-1])


def _ace_step() -> Case:
    def make() -> ModelPatcher:
        with smaller(comfy.ldm.ace.model, "LyricEncoder", output_size=16, attention_heads=2, linear_units=24, num_blocks=1):
            return tiny(
                comfy.supported_models.ACEStep, audio_model="ace", num_layers=3, attention_head_dim=16, num_attention_heads=3,
                text_embedding_dim=24, lyric_encoder_vocab_size=50, lyric_hidden_size=16, ssl_latent_dims=[8, 8], max_width=64,
            )  # fmt: skip

    lyrics = torch.arange(5)[None]
    return Case("ace_step", make, (8, 16, 20), text(7, 24, conditioning_lyrics=lyrics), lambda m: m.transformer_blocks[-1])


class _StableAudio(comfy.supported_models.StableAudio):
    """Has embedders of the seconds that need no checkpoint."""

    def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> Any:
        weights = comfy.ldm.audio.embedders.NumberConditioner(768, 0, 512).state_dict()
        weights = {name: seeded(*weight.shape) * 0.1 for name, weight in weights.items()}
        return comfy.model_base.StableAudio1(self, weights, weights, device=device)


def _stable_audio() -> Case:
    def make() -> ModelPatcher:
        model = tiny(_StableAudio, audio_model="dit1.0", embed_dim=128, num_heads=2, depth=3, project_cond_tokens=True)
        model.model.diffusion_model.transformer.rotary_pos_emb.inv_freq.copy_(10000.0 ** -torch.linspace(0, 1, 16))
        return model

    return Case("stable_audio", make, (64, 20), text(7, 768), lambda m: m.transformer.layers[-1])


CASES = (
    wan_case("wan", wan_t2v),
    wan_case("wan_i2v", wan_i2v, clip_vision_output=clip_picture(), concat_latent_image=seeded(1, 16, 3, 8, 6)),
    wan_case("wan_vace", wan_vace, vace_frames=[seeded(1, 32, 3, 8, 6)], vace_mask=[seeded(1, 64, 3, 8, 6).abs()]),
    wan_case("wan_animate", wan_animate, clip_vision_output=clip_picture(), pose_video_latent=seeded(1, 16, 2, 8, 6)),
    wan_case("wan_s2v", wan_s2v),
    wan_case("wan_humo", wan_humo, audio_embed=seeded(1, 3, 8, 5, 8)),
    _ltxv(),
    Case("cosmos", _cosmos, (16, 2, 6, 4), text(7, 24), lambda m: m.blocks["block2"]),
    Case("cosmos_predict2", cosmos_predict2, (16, 2, 6, 4), text(7, 24), lambda m: m.blocks[-1]),
    _mochi(),
    _ace_step(),
    _stable_audio(),
)

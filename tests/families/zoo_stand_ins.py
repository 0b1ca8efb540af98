"""Makes small stand-ins of models that only newer hosts have, and Hunyuan3D 2.1, for zoo.py."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import comfy.sample
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from making import Case, text, tiny
from stand_in_ace15 import AceStepConditionGenerationModel
from stand_in_ernie_helios import Ernie, Helios
from stand_in_ernie_helios import config_of as config_of_ernie
from stand_in_hidream_o1_minimax import TMS, HiDreamO1, MiniMaxH3
from stand_in_kandinsky_cogvideox_anima import Anima, AnimaHost, CogVideoXTransformer3DModel, Kandinsky5, config_of
from stand_in_ltxav import LTXAV, LTXAVModel
from zoo_image import with_more
from zoo_video import seeded

KANDINSKY_LATENT = (4, 3, 6, 8)


def kandinsky5() -> ModelPatcher:
    return tiny(
        config_of(Kandinsky5, 4, 3, pooled_output="y"),
        model_dim=48,
        time_dim=32,
        ff_dim=96,
        channels=4,
        text=24,
        pooled=12,
        heads=2,
        depth=3,
    )


def cogvideox(patch_size_t: int | None = None) -> ModelPatcher:
    sizes = {"dim": 48, "heads": 2, "channels": 4, "time": 32, "text": 24, "depth": 3}
    return tiny(config_of(CogVideoXTransformer3DModel, 4, 3), patch_size_t=patch_size_t, **sizes)


def anima() -> ModelPatcher:
    return tiny(
        config_of(Anima, 16, 3, AnimaHost), image_model="anima", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16,
        out_channels=16, patch_spatial=2, patch_temporal=1, model_channels=48, num_blocks=3, num_heads=2, crossattn_emb_channels=24,
        pos_emb_cls="rope3d", pos_emb_learnable=True, use_adaln_lora=True, adaln_lora_dim=8,
    )  # fmt: skip


def ace_step15() -> ModelPatcher:
    named = {"lyrics": "lyric_embed", "reference": "refer_audio", "codes": "audio_codes"}
    return tiny(config_of(AceStepConditionGenerationModel, 8, 1, **named), audio=8, text=24, hidden_size=48, depth=3)


def ltxav() -> ModelPatcher:
    return tiny(config_of(LTXAVModel, 16, 3, LTXAV), inner_dim=32, audio_inner_dim=16, in_channels=16, text=12, depth=2)


def hunyuan3d_2_1() -> ModelPatcher:
    """Makes a model in which two blocks have a long skip and two have experts."""
    return tiny(
        comfy.supported_models.Hunyuan3Dv2_1, image_model="hunyuan3d2_1", in_channels=64, context_dim=24, hidden_size=32, depth=5,
        num_heads=2, qkv_bias=False, num_moe_layers=2, num_experts=4, guidance_cond_proj_dim=None,
    )  # fmt: skip


def ernie() -> ModelPatcher:
    return tiny(config_of_ernie(Ernie, 16))


def helios() -> ModelPatcher:
    return tiny(config_of_ernie(Helios, 16, 3))


def minimax_h3(**more: Any) -> ModelPatcher:
    return tiny(config_of_ernie(MiniMaxH3, 1, 1), **more)


def hidream_o1() -> ModelPatcher:
    """Returns a model that has sampled once, which fills the host's own cache of the text. Later runs are then equal to the last bit."""
    model, latent = tiny(config_of_ernie(HiDreamO1, 3)), torch.zeros(1, 3, 24, 32)
    noise = comfy.sample.prepare_noise(latent, 5)
    comfy.sample.sample(model, noise, 1, 2.0, "euler", "simple", ids()(1), ids()(2), latent, seed=5, disable_pbar=True)
    return model


def ids(**more: Any) -> Callable[[int], list]:
    """Returns a function that makes HiDream-O1's prompts: token ids of unequal number, the last one for the noise level."""

    def cond(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, 32, (1, 5 + 2 * (seed % 2)), generator=generator)
        tokens[:, -1] = TMS
        return [[torch.zeros(1, 1, 1), {"text_input_ids": tokens, **more}]]

    return cond


_SONG = with_more(text(5, 24, codes=torch.arange(20)[None] % 16), lyrics=(1, 9, 24), reference=(1, 8, 99))
PACKED = (1, sum(prod(shape) for shape in MiniMaxH3.shapes))
LTX_2 = Case("ltxav", ltxav, ((16, 2, 3, 4), (2, 5, 8)), text(7, 24), lambda m: m.transformer_blocks[-1])
CASES = (
    Case("kandinsky5", kandinsky5, KANDINSKY_LATENT, text(7, 24, pooled_output=seeded(1, 12)), lambda m: m.visual_transformer_blocks[-1]),
    Case("cogvideox", cogvideox, (4, 3, 6, 8), text(7, 24), lambda m: m.blocks[-1]),
    Case("cogvideox_1_5", lambda: cogvideox(2), (4, 3, 6, 8), text(7, 24), lambda m: m.blocks[-1]),
    Case("anima", anima, (16, 2, 6, 4), text(7, 24, t5xxl_ids=torch.arange(5) % 3), lambda m: m.blocks[-1]),
    Case("ace_step15", ace_step15, (8, 99), _SONG, lambda m: m.decoder.layers[-1]),
    LTX_2,
    Case("hunyuan3d_2_1", hunyuan3d_2_1, (64, 24), text(9, 24), lambda m: m.blocks[-1]),
    Case("ernie", ernie, (16, 12, 16), text(7, 24), lambda m: m.layers[-1]),
    Case("helios", helios, (16, 3, 8, 6), text(7, 24), lambda m: m.blocks[-1]),
    Case("hidream_o1", hidream_o1, (3, 24, 32), ids(), lambda m: m.language_model.layers[-1], calls=2),
    Case("minimax_h3", minimax_h3, PACKED, text(7, 48), lambda m: m.blocks[-1], calls=2),
)

"""Small stand-ins of models that only newer hosts have, for zoo.py."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from making import Case, text, tiny
from stand_in_ace15 import AceStepConditionGenerationModel
from stand_in_ltxav import LTXAV, LTXAVModel
from stand_in_newer_a import Anima, AnimaHost, CogVideoXTransformer3DModel, Kandinsky5, config_of
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


_SONG = with_more(text(5, 24, codes=torch.arange(20)[None] % 16), lyrics=(1, 9, 24), reference=(1, 8, 99))

CASES = (
    Case("kandinsky5", kandinsky5, KANDINSKY_LATENT, text(7, 24, pooled_output=seeded(1, 12)), lambda m: m.visual_transformer_blocks[-1]),
    Case("cogvideox", cogvideox, (4, 3, 6, 8), text(7, 24), lambda m: m.blocks[-1], 0),
    Case("cogvideox_1_5", lambda: cogvideox(2), (4, 3, 6, 8), text(7, 24), lambda m: m.blocks[-1], 0),
    Case("anima", anima, (16, 2, 6, 4), text(7, 24, t5xxl_ids=torch.arange(5) % 3), lambda m: m.blocks[-1]),
    Case("ace_step15", ace_step15, (8, 99), _SONG, lambda m: m.decoder.layers[-1]),
)
PAIR = Case("ltxav", ltxav, ((16, 2, 3, 4), (2, 5, 8)), text(7, 24), lambda m: m.transformer_blocks[-1])

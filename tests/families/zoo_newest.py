"""Makes small models of classes that only newer hosts have. `CASES` has those that this host has; for the others there are stand-ins."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

import comfy.ldm.audio.embedders
import comfy.model_base
import comfy.sample
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from making import Case, text, tiny
from zoo_image import normal, with_more
from zoo_video import seeded, smaller


def _config(name: str) -> Any:
    return getattr(comfy.supported_models, name)


def kandinsky5() -> ModelPatcher:
    return tiny(
        _config("Kandinsky5"), image_model="kandinsky5", model_dim=48, time_dim=32, ff_dim=96, in_text_dim=24, in_text_dim2=12,
        axes_dims=(8, 8, 8), num_text_blocks=1, num_visual_blocks=3,
    )  # fmt: skip


def cogvideox(**more: Any) -> ModelPatcher:
    return tiny(
        _config("CogVideoX_T2V"), image_model="cogvideox", num_attention_heads=3, attention_head_dim=16, time_embed_dim=32,
        text_embed_dim=24, num_layers=3, sample_width=8, sample_height=6, sample_frames=9, max_text_seq_length=7, **more,
    )  # fmt: skip


def anima() -> ModelPatcher:
    module = import_module("comfy.ldm.anima.model")
    with smaller(module, "LLMAdapter", source_dim=24, target_dim=24, model_dim=24, num_layers=1, num_heads=2):
        return tiny(
            _config("Anima"), image_model="anima", max_img_h=240, max_img_w=240, max_frames=128, in_channels=16, out_channels=16,
            patch_spatial=2, patch_temporal=1, model_channels=48, num_blocks=3, num_heads=2, crossattn_emb_channels=24,
            pos_emb_cls="rope3d", pos_emb_learnable=True, use_adaln_lora=True, adaln_lora_dim=8,
        )  # fmt: skip


def ace_step15() -> ModelPatcher:
    return tiny(
        _config("ACEStep15"), audio_model="ace1.5", hidden_size=48, text_hidden_dim=24, num_dit_layers=3, num_lyric_layers=1,
        num_timbre_layers=1, num_tokenizer_layers=1, num_heads=3, num_kv_heads=3, head_dim=16, intermediate_size=96, fsq_dim=48,
        fsq_levels=[4, 4], encoder_hidden_size=48, encoder_intermediate_size=96, encoder_num_heads=3,
    )  # fmt: skip


def ernie() -> ModelPatcher:
    return tiny(
        _config("ErnieImage"), image_model="ernie", hidden_size=48, num_attention_heads=2, num_layers=3, ffn_hidden_size=96,
        text_in_dim=24, rope_axes_dim=(8, 8, 8),
    )  # fmt: skip


def minimax_h3(**more: Any) -> ModelPatcher:
    sizes = {
        "image_model": "minimax_h3", "hidden_size": 48, "num_layers": 3, "token_refiner_num_layers": 1, "num_attention_heads": 2,
        "attention_head_dim": 24, "ffn_hidden_size": 96, "text_dim": 24, "timestep_input_dim": 32, "time_embed_hidden_size": 32,
        "time_embed_dim": 16, "rope_inv_freq_len": 4,
    }  # fmt: skip
    model = tiny(_config("MiniMaxH3"), **(sizes | more))
    network = model.model.diffusion_model
    network.rope.inv_freq.copy_(10000.0 ** -torch.linspace(0, 1, 4))  # buffers are no parameters
    if network.use_adaln_curves:
        network.adaln_t_table.copy_(normal(2, *network.adaln_t_table.shape))
    return model


def ltxav(**more: Any) -> ModelPatcher:
    sizes = {
        "image_model": "ltxav", "cross_attention_dim": 48, "audio_cross_attention_dim": 32, "attention_head_dim": 12,
        "audio_attention_head_dim": 8, "num_attention_heads": 4, "audio_num_attention_heads": 4, "caption_channels": 24, "num_layers": 3,
        "connector_attention_head_dim": 12, "connector_num_attention_heads": 2, "connector_num_layers": 1,
    }  # fmt: skip
    return tiny(_config("LTXAV"), **(sizes | more))


def hidream_o1() -> ModelPatcher:
    """Returns a model that has sampled once, which fills the host's own cache of the text. Later runs are then equal to the last bit."""
    model = tiny(
        _config("HiDreamO1"), image_model="hidream_o1",
        text_config_overrides={
            "hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2, "num_key_value_heads": 1,
            "head_dim": 24, "rope_dims": [4, 4, 4],
        },
        vision_config_overrides={"hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "depth": 1, "deepstack_visual_indexes": ()},
    )  # fmt: skip
    latent = torch.zeros(1, *_PIXELS)
    noise = comfy.sample.prepare_noise(latent, 5)
    comfy.sample.sample(model, noise, 1, 2.0, "euler", "simple", ids()(1), ids()(2), latent, seed=5, disable_pbar=True)
    return model


def ids(**more: Any) -> Callable[[int], list]:
    """Returns a function that makes HiDream-O1's prompts: token ids of unequal number, the last one for the noise level."""

    def cond(seed: int) -> list:
        tokens = torch.randint(3, 32, (1, 5 + 2 * (seed % 2)), generator=torch.Generator().manual_seed(seed))
        tokens[:, -1] = import_module("comfy.ldm.hidream_o1.model").TMS_TOKEN_ID
        return [[torch.zeros(1, 1, 1), {"text_input_ids": tokens, **more}]]

    return cond


def stable_audio3(**attention: Any) -> ModelPatcher:
    """Makes a model whose embedders of the seconds need no checkpoint."""

    class Config(_config("StableAudio3")):  # type: ignore[misc]
        def get_model(self, state_dict: dict, prefix: str = "", device: Any = None) -> Any:
            weights = comfy.ldm.audio.embedders.NumberConditioner(768, 0, 384, fourier_features_type="expo").state_dict()
            weights = {name: seeded(*weight.shape) * 0.1 for name, weight in weights.items()}
            return comfy.model_base.StableAudio3(self, weights, device=device)

    model = tiny(
        Config, audio_model="dit1.0", io_channels=256, embed_dim=128, num_heads=2, depth=3, project_cond_tokens=True, global_cond_dim=768,
        global_cond_type="adaLN", global_cond_shared_embed=True, num_memory_tokens=4, local_add_cond_dim=257, norm_type="rms_norm",
        timestep_features_type="expo", attn_kwargs={"qk_norm": "rms", "differential": True, **attention},
    )  # fmt: skip
    model.model.diffusion_model.transformer.rotary_pos_emb.inv_freq.copy_(10000.0 ** -torch.linspace(0, 1, 16))
    return model


_PIXELS = (3, 96, 128)
_H3, _LTX = ((24, 2, 4, 6), (32, 2, 5)), ((128, 2, 3, 4), (8, 5, 16))
_SONG = with_more(text(5, 24, audio_codes=[[*list(range(16)), 3, 5, 7, 9]]), conditioning_lyrics=(1, 9, 24))
_PROMPT = text(5, 24, t5xxl_ids=torch.arange(5) % 3, t5xxl_weights=torch.ones(5))

_ALL = {
    "Kandinsky5": (
        Case("kandinsky5", kandinsky5, (16, 3, 6, 8), text(7, 24, pooled_output=seeded(1, 12)), lambda m: m.visual_transformer_blocks[-1]),
    ),
    "CogVideoX_T2V": (
        Case("cogvideox", cogvideox, (16, 3, 6, 8), text(7, 24), lambda m: m.blocks[-1]),
        Case(
            "cogvideox_1_5",
            lambda: cogvideox(patch_size_t=2, use_rotary_positional_embeddings=True),
            (16, 3, 6, 8),
            text(7, 24),
            lambda m: m.blocks[-1],
        ),
    ),
    "Anima": (Case("anima", anima, (16, 2, 6, 4), _PROMPT, lambda m: m.blocks[-1]),),
    "ACEStep15": (Case("ace_step15", ace_step15, (64, 99), _SONG, lambda m: m.decoder.layers[-1]),),
    "ErnieImage": (Case("ernie", ernie, (128, 6, 8), text(7, 24), lambda m: m.layers[-1]),),
    "HiDreamO1": (Case("hidream_o1", hidream_o1, _PIXELS, ids(), lambda m: m.language_model.layers[-1], calls=2),),
    "MiniMaxH3": (Case("minimax_h3", minimax_h3, _H3, text(7, 24), lambda m: m.blocks[-1], calls=2),),
    "LTXAV": (Case("ltxav", ltxav, _LTX, text(7, 48), lambda m: m.transformer_blocks[-1]),),
    "StableAudio3": (Case("stable_audio", stable_audio3, (256, 20), text(7, 768), lambda m: m.transformer.layers[-1]),),
}
CASES = tuple(case for name, cases in _ALL.items() if hasattr(comfy.supported_models, name) for case in cases)

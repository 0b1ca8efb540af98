"""Hunyuan3D 2.1 and stand-ins for families of newer hosts, for zoo.py."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import comfy.sample
import comfy.supported_models
import torch
from comfy.model_patcher import ModelPatcher
from making import Case, text, tiny
from stand_in_newer_b import Ernie, Helios, config_of
from stand_in_newer_b_in_place import TMS, HiDreamO1, MiniMaxH3


def hunyuan3d_2_1() -> ModelPatcher:
    """Two of its blocks have a long skip, two have experts."""
    return tiny(
        comfy.supported_models.Hunyuan3Dv2_1, image_model="hunyuan3d2_1", in_channels=64, context_dim=24, hidden_size=32, depth=5,
        num_heads=2, qkv_bias=False, num_moe_layers=2, num_experts=4, guidance_cond_proj_dim=None,
    )  # fmt: skip


def ernie() -> ModelPatcher:
    return tiny(config_of(Ernie, 16))


def helios() -> ModelPatcher:
    return tiny(config_of(Helios, 16, 3))


def minimax_h3(**more: Any) -> ModelPatcher:
    return tiny(config_of(MiniMaxH3, 1, 1), **more)


def hidream_o1() -> ModelPatcher:
    """Sampled once, so that the host's own cache of the text is filled: runs after that are alike to the last bit."""
    model, latent = tiny(config_of(HiDreamO1, 3)), torch.zeros(1, 3, 24, 32)
    noise = comfy.sample.prepare_noise(latent, 5)
    comfy.sample.sample(model, noise, 1, 2.0, "euler", "simple", ids()(1), ids()(2), latent, seed=5, disable_pbar=True)
    return model


def ids(**more: Any) -> Callable[[int], list]:
    """Prompts of HiDream-O1: token numbers, of unequal number, the last one for the noise level."""

    def cond(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(3, 32, (1, 5 + 2 * (seed % 2)), generator=generator)
        tokens[:, -1] = TMS
        return [[torch.zeros(1, 1, 1), {"text_input_ids": tokens, **more}]]

    return cond


PACKED = (1, sum(prod(shape) for shape in MiniMaxH3.shapes))

CASES = (
    Case("hunyuan3d_2_1", hunyuan3d_2_1, (64, 24), text(9, 24), lambda m: m.blocks[-1]),
    Case("ernie", ernie, (16, 12, 16), text(7, 24), lambda m: m.layers[-1]),
    Case("helios", helios, (16, 3, 8, 6), text(7, 24), lambda m: m.blocks[-1]),
    Case("hidream_o1", hidream_o1, (3, 24, 32), ids(), lambda m: m.language_model.layers[-1], 0, calls=2),
    Case("minimax_h3", minimax_h3, PACKED, text(7, 48), lambda m: m.blocks[-1], calls=2),
)

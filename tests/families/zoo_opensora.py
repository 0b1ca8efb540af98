"""Makes small models of the structure of Open-Sora 1.2 and 2, for zoo.py."""

from __future__ import annotations

import torch
from comfy.model_patcher import ModelPatcher
from making import Case, text, tiny
from stand_in_mmdit import OpenSora2Config
from stand_in_stdit import OpenSoraConfig

LATENT = (4, 3, 8, 7)  # the last column of patches is padded with zeros


def opensora() -> ModelPatcher:
    return tiny(OpenSoraConfig, hidden_size=48, depth=3, num_heads=2, in_channels=4, caption_channels=24)


def caption(seed: int) -> list:
    """Returns texts of different lengths in the same number of tokens."""
    mask = torch.ones(1, 7)
    mask[:, 5 + 2 * (seed % 2) :] = 0
    return text(7, 24, attention_mask=mask)(seed)


def opensora2(fused_qkv: bool = False) -> ModelPatcher:
    return tiny(OpenSora2Config, hidden_size=32, depth=2, num_heads=2, in_channels=64, context_in_dim=24, fused_qkv=fused_qkv)


CASES = (
    Case("opensora", opensora, LATENT, caption, lambda m: m.temporal_blocks[-1]),
    Case("opensora2", opensora2, (16, 3, 8, 6), text(7, 24, pooled_output=torch.ones(1, 8)), lambda m: m.single_blocks[-1]),
    Case("opensora2", lambda: opensora2(True), (16, 3, 8, 6), text(7, 24, pooled_output=torch.ones(1, 8)), lambda m: m.single_blocks[-1]),
)

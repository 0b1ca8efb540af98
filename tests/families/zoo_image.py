"""Makes small models of the image families besides FLUX and Qwen-Image, for zoo.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.supported_models as models
import torch
from making import Case, text, tiny


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def with_more(cond: Callable[[int], list], **shapes: tuple[int, ...]) -> Callable[[int], list]:
    """Returns a function that makes conditioning with random tensors of these shapes beside the text."""

    def more(seed: int) -> list:
        tensors = {name: normal(seed + 10 * i, *shape) for i, (name, shape) in enumerate(shapes.items(), start=1)}
        return [[tokens, {**extra, **tensors}] for tokens, extra in cond(seed)]

    return more


def pixart(**more: Any):
    """Makes PixArt-alpha, which unlike Sigma also gets vectors for the picture's size."""
    return tiny(
        models.PixArtAlpha, image_model="pixart_alpha", num_heads=2, hidden_size=48, in_channels=4, depth=3, caption_channels=24,
        model_max_length=8, micro_condition=True, **more,
    )  # fmt: skip


def lumina2():
    return tiny(
        models.Lumina2, image_model="lumina2", in_channels=16, dim=48, n_layers=3, n_refiner_layers=1, n_heads=4, n_kv_heads=2,
        multiple_of=32, ffn_dim_multiplier=1.0, qk_norm=True, cap_feat_dim=24, axes_dims=(4, 4, 4), axes_lens=(30, 32, 32),
    )  # fmt: skip


def z_image():
    return tiny(
        models.ZImage, image_model="lumina2", in_channels=16, dim=256, n_layers=2, n_refiner_layers=1, n_heads=4, multiple_of=32,
        ffn_dim_multiplier=0.25, qk_norm=True, cap_feat_dim=24, axes_dims=(16, 24, 24), axes_lens=(30, 32, 32), z_image_modulation=True,
        time_scale=1000.0, pad_tokens_multiple=32,
    )  # fmt: skip


def sd3():
    """Makes an SD3 with a second attention in the first block, as SD3.5-medium has."""
    embedder = {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 128}}
    model = tiny(
        models.SD3, input_size=None, in_channels=16, out_channels=16, depth=2, num_blocks=3, adm_in_channels=32, num_patches=256,
        pos_embed_max_size=16, qk_norm="rms", x_block_self_attn_layers=[0], context_embedder_config=embedder, pos_embed_scaling_factor=None,
    )  # fmt: skip
    model.model.diffusion_model.pos_embed.copy_(normal(3, 1, 256, 128))  # no parameter but a buffer
    return model


def hidream():
    return tiny(
        models.HiDream, image_model="hidream", patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, caption_channels=[24, 20], text_emb_dim=32, num_routed_experts=4,
        num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(32, 32), llama_layers=[0, 1, 2, 2],
    )  # fmt: skip


def aura():
    return tiny(
        models.AuraFlow, cond_seq_dim=24, in_channels=4, out_channels=4, dim=32, n_heads=2, n_layers=4, n_double_layers=2,
        global_conddim=32, max_seq=256,
    )  # fmt: skip


def omnigen():
    return tiny(
        models.Omnigen2, image_model="omnigen2", in_channels=16, hidden_size=48, num_layers=3, num_refiner_layers=1, num_attention_heads=4,
        num_kv_heads=2, multiple_of=32, axes_dim_rope=(4, 4, 4), axes_lens=(30, 32, 32), text_feat_dim=24, timestep_scale=1000.0,
    )  # fmt: skip


def hydit():
    return tiny(
        models.HunyuanDiT, image_model="hydit", hidden_size=48, depth=6, num_heads=2, text_states_dim=24, text_states_dim_t5=32, text_len=7,
        text_len_t5=9,
    )  # fmt: skip


def _of_hydit(seed: int) -> list:
    """Returns conditioning of which some tokens of both texts are padding."""
    clip, t5 = torch.ones(1, 7), torch.ones(1, 9)
    clip[:, 5:], t5[:, 4:] = 0, 0
    extra = {"attention_mask": clip, "conditioning_mt5xl": normal(seed + 10, 1, 9, 32), "attention_mask_mt5xl": t5}
    return [[normal(seed, 1, 7, 24), extra]]


def controlled(model, residuals: list[torch.Tensor]):
    """Passes a ControlNet's residuals as the host does: anew in every call, as HunyuanDiT takes them off the list."""
    clone = model.clone()

    def call(apply_model, given):
        control = {"output": [residual.expand(given["input"].shape[0], -1, -1).clone() for residual in residuals]}
        return apply_model(given["input"], given["timestep"], **{**given["c"], "control": control})

    clone.set_model_unet_function_wrapper(call)
    return clone


CASES = (
    Case("pixart", pixart, (4, 24, 48), text(7, 24), lambda m: m.blocks[-1]),  # smaller pictures divide by zero in the host
    Case("lumina", lumina2, (16, 12, 16), text(7, 24), lambda m: m.layers[-1]),
    Case("lumina", z_image, (16, 12, 16), text(7, 24), lambda m: m.layers[-1]),  # 48 and 7 tokens, each padded to a multiple of 32
    Case("sd3", sd3, (16, 24, 32), with_more(text(7, 24), pooled_output=(1, 32)), lambda m: m.joint_blocks[-1]),
    Case(
        "hidream",
        hidream,
        (16, 12, 16),
        with_more(text(5, 24), pooled_output=(1, 32), conditioning_llama3=(1, 3, 5, 20)),
        lambda m: m.single_stream_blocks[-1],
    ),
    Case("aura", aura, (4, 12, 16), text(7, 24), lambda m: m.single_layers[-1]),
    Case("omnigen", omnigen, (16, 12, 16), text(7, 24, attention_mask=torch.ones(1, 7, dtype=torch.long)), lambda m: m.layers[-1]),
    Case("hydit", hydit, (4, 12, 16), _of_hydit, lambda m: m.blocks[-1]),
)

"""Stand-ins for ERNIE-Image and Helios, and what HiDream-O1's and MiniMax H3's need: small models for hosts that have no such class.

Written for these tests after the structure of comfy/ldm/{ernie,helios,hidream_o1,minimax}/model.py of public ComfyUI (the families' files
name the versions): names of submodules, parameters of forwards, the order of sublayers and of tokens, what is written in place, what is
kept from one evaluation to the next. Attention is torch's own and positions are plain rotations over one axis. Dropout, sizes that are no
whole patches, sparse attention, heads in banks and prefetching are left out.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class Ops:
    """The host's operations with dtype and device filled in."""

    def __init__(self, operations: Any, dtype: Any, device: Any) -> None:
        self.operations, self.place = operations, {"dtype": dtype, "device": device}

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **more: getattr(self.operations, name)(*args, **self.place, **more)


def angles(positions: Tensor, width: int) -> Tensor:
    """Returns angles (..., width/2) of positions (...)."""
    return positions.float()[..., None] * torch.exp(-math.log(10000) * torch.arange(width // 2) / (width // 2))


def waves(numbers: Tensor, width: int) -> Tensor:
    """Returns cosines and sines (..., width) of numbers (...)."""
    phases = angles(numbers * 1000, width)
    return torch.cat((phases.cos(), phases.sin()), -1)


def turned(x: Tensor, phases: Tensor) -> Tensor:
    """Rotates x (B, L, H, D) by phases (B or 1, L, D/2)."""
    cos, sin = phases.cos()[:, :, None], phases.sin()[:, :, None]
    a, b = x.chunk(2, -1)
    return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool = False) -> Tensor:
    """Attends with q, k and v (B, L, H, D). Returns (B, L, H·D)."""
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2).flatten(2)


class TimestepEmbedding(nn.Module):
    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.linear_1, self.linear_2 = ops.Linear(width, width), ops.Linear(width, width)

    def forward(self, sample: Tensor) -> Tensor:
        return self.linear_2(F.silu(self.linear_1(sample)))


# -- ERNIE-Image ------------------------------------------------------------------------------------------


class ErnieAttention(nn.Module):
    def __init__(self, width: int, heads: int, ops: Ops) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (ops.Linear(width, width, bias=False) for _ in range(3))
        self.norm_q, self.norm_k = ops.RMSNorm(width // heads), ops.RMSNorm(width // heads)
        self.to_out = nn.ModuleList([ops.Linear(width, width, bias=False)])

    def forward(self, x: Tensor, attention_mask: Any = None, image_rotary_emb: Any = None) -> Tensor:
        q, k, v = (layer(x).unflatten(-1, (self.heads, -1)) for layer in (self.to_q, self.to_k, self.to_v))
        return self.to_out[0](attend(turned(self.norm_q(q), image_rotary_emb), turned(self.norm_k(k), image_rotary_emb), v))


class ErnieMlp(nn.Module):
    def __init__(self, width: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = ops.Linear(width, inner, bias=False), ops.Linear(width, inner, bias=False)
        self.linear_fc2 = ops.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_fc2(self.up_proj(x) * F.gelu(self.gate_proj(x)))


class ErnieBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.adaLN_sa_ln, self.adaLN_mlp_ln = ops.RMSNorm(width), ops.RMSNorm(width)
        self.self_attention, self.mlp = ErnieAttention(width, heads, ops), ErnieMlp(width, inner, ops)

    def forward(self, x: Tensor, rotary_pos_emb: Tensor, temb: list, attention_mask: Any = None) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = temb
        normed = self.adaLN_sa_ln(x) * (1 + scale) + shift
        x = x + gate * self.self_attention(normed, attention_mask=attention_mask, image_rotary_emb=rotary_pos_emb)
        return x + gate_mlp * self.mlp(self.adaLN_mlp_ln(x) * (1 + scale_mlp) + shift_mlp)


class ErnieFinalNorm(nn.Module):
    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.norm, self.linear = ops.LayerNorm(width, elementwise_affine=False), ops.Linear(width, 2 * width)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        scale, shift = self.linear(conditioning)[:, None].chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class ErniePatches(nn.Module):
    def __init__(self, channels: int, width: int, size: int, ops: Ops) -> None:
        super().__init__()
        self.proj = ops.Conv2d(channels, width, kernel_size=size, stride=size)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class ErnieImageModel(nn.Module):
    def __init__(self, in_channels=16, hidden_size=48, heads=2, num_layers=3, inner=96, text_in_dim=24, patch_size=2,
                 dtype=None, device=None, operations=None, **_more: Any) -> None:  # fmt: skip
        super().__init__()
        ops = Ops(operations, dtype, device)
        self.dtype, self.hidden_size, self.patch_size, self.out_channels = dtype, hidden_size, patch_size, in_channels
        self.head_size = hidden_size // heads
        self.x_embedder = ErniePatches(in_channels, hidden_size, patch_size, ops)
        self.text_proj = ops.Linear(text_in_dim, hidden_size, bias=False) if text_in_dim != hidden_size else None
        self.time_embedding = TimestepEmbedding(hidden_size, ops)
        self.pos_embed = nn.Identity()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(hidden_size, 6 * hidden_size))
        self.layers = nn.ModuleList([ErnieBlock(hidden_size, heads, inner, ops) for _ in range(num_layers)])
        self.final_norm = ErnieFinalNorm(hidden_size, ops)
        self.final_linear = ops.Linear(hidden_size, patch_size**2 * in_channels)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_more: Any) -> Tensor:
        image = self.x_embedder(x)
        text = context if self.text_proj is None else self.text_proj(context)
        tokens = torch.cat((image, text), 1)
        phases = angles(torch.arange(tokens.shape[1])[None], self.head_size)
        c = self.time_embedding(waves(timesteps / 1000, self.hidden_size).to(x.dtype))
        temb = [part.unsqueeze(1) for part in self.adaLN_modulation(c).chunk(6, -1)]
        for layer in self.layers:
            tokens = layer(tokens, phases, temb)
        p, rows = self.patch_size, x.shape[2] // self.patch_size
        patches = self.final_linear(self.final_norm(tokens, c))[:, : image.shape[1]]
        return patches.unflatten(1, (rows, -1)).unflatten(-1, (p, p, -1)).permute(0, 5, 1, 3, 2, 4).reshape(x.shape)


# -- Helios -------------------------------------------------------------------------------------------------


class HeliosAttention(nn.Module):
    def __init__(self, width: int, heads: int, ops: Ops) -> None:
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (ops.Linear(width, width) for _ in range(3))
        self.to_out = nn.ModuleList([ops.Linear(width, width), nn.Dropout(0.0)])
        self.norm_q, self.norm_k = ops.RMSNorm(width), ops.RMSNorm(width)

    def forward(self, x: Tensor, context: Any = None, freqs: Any = None, original_context_length: Any = None,
                transformer_options: Any = {}) -> Tensor:  # fmt: skip  # noqa: B006
        seen = x if context is None else context
        q, k, v = self.norm_q(self.to_q(x)), self.norm_k(self.to_k(seen)), self.to_v(seen)
        q, k, v = (part.unflatten(-1, (self.heads, -1)) for part in (q, k, v))
        if freqs is not None:
            q, k = turned(q, freqs), turned(k, freqs)
        return self.to_out[1](self.to_out[0](attend(q, k, v)))


class HeliosBlock(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, guidance_cross_attn: bool, ops: Ops) -> None:
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (ops.LayerNorm(width, elementwise_affine=affine) for affine in (False, True, False))
        self.attn1, self.attn2 = HeliosAttention(width, heads, ops), HeliosAttention(width, heads, ops)
        self.ffn = nn.Sequential(ops.Linear(width, inner), nn.GELU(approximate="tanh"), ops.Linear(inner, width))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, width))
        self.guidance_cross_attn = guidance_cross_attn

    def forward(self, x: Tensor, context: Tensor, e: Tensor, freqs: Tensor, original_context_length: Any = None,
                transformer_options: Any = {}) -> Tensor:  # fmt: skip  # noqa: B006
        shift, scale, gate, shift_ffn, scale_ffn, gate_ffn = (self.scale_shift_table[:, None] + e).unbind(2)
        x = x + gate * self.attn1(self.norm1(x) * (1 + scale) + shift, freqs=freqs, original_context_length=original_context_length)
        history, video = torch.split(x, [x.shape[1] - original_context_length, original_context_length], dim=1)
        x = torch.cat((history, video + self.attn2(self.norm2(video), context=context)), 1)
        return x + gate_ffn * self.ffn(self.norm3(x) * (1 + scale_ffn) + shift_ffn)


class HeliosOutputNorm(nn.Module):
    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, width))
        self.norm = ops.LayerNorm(width, elementwise_affine=False)

    def forward(self, hidden_states: Tensor, temb: Tensor, original_context_length: int) -> Tensor:
        shift, scale = (self.scale_shift_table[:, None] + temb[:, -original_context_length:, None]).unbind(2)
        return self.norm(hidden_states[:, -original_context_length:]) * (1 + scale) + shift


class HeliosModel(nn.Module):
    def __init__(self, in_channels=16, dim=48, heads=2, num_layers=3, ffn_dim=96, text_dim=24, freq_dim=32, guidance_cross_attn=True,
                 dtype=None, device=None, operations=None, **_more: Any) -> None:  # fmt: skip
        super().__init__()
        ops = Ops(operations, dtype, device)
        self.dtype, self.dim, self.freq_dim, self.heads, self.patch_size = dtype, dim, freq_dim, heads, (1, 2, 2)
        sizes = [tuple(times * p for p in self.patch_size) for times in (1, 1, 2, 4)]
        embeddings = [ops.Conv3d(in_channels, dim, kernel_size=size, stride=size) for size in sizes]
        self.patch_embedding, self.patch_short, self.patch_mid, self.patch_long = embeddings
        self.text_embedding = nn.Sequential(ops.Linear(text_dim, dim), nn.GELU(approximate="tanh"), ops.Linear(dim, dim))
        self.time_embedding = nn.Sequential(ops.Linear(freq_dim, dim), nn.SiLU(), ops.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), ops.Linear(dim, 6 * dim))
        self.rope_embedder = nn.Identity()
        self.blocks = nn.ModuleList([HeliosBlock(dim, ffn_dim, heads, guidance_cross_attn, ops) for _ in range(num_layers)])
        self.norm_out, self.proj_out = HeliosOutputNorm(dim, ops), ops.Linear(dim, in_channels * math.prod(self.patch_size))

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, clip_fea: Any = None, time_dim_concat: Any = None,
                transformer_options: Any = {}, **kwargs: Any) -> Tensor:  # fmt: skip  # noqa: B006
        tokens = self.patch_embedding(x).flatten(2).transpose(1, 2)
        video = tokens.shape[1]
        for name in ("short", "mid", "long"):
            if (past := kwargs.get(f"latents_history_{name}")) is not None:
                tokens = torch.cat((getattr(self, f"patch_{name}")(past).flatten(2).transpose(1, 2), tokens), 1)
        freqs = angles(torch.arange(tokens.shape[1])[None], self.dim // self.heads)
        at = torch.cat((torch.zeros(1), timestep / 1000))  # the history has no noise
        e = self.time_embedding(waves(at, self.freq_dim).to(x.dtype))
        e0 = self.time_projection(e).unflatten(-1, (6, self.dim))
        clean, now = ((e[:1], e0[:1]), (e[1:], e0[1:]))
        count = (tokens.shape[1] - video, video)
        each, each0 = (
            torch.cat([part[i][:, None].expand(len(x), n, *part[i].shape[1:]) for part, n in zip((clean, now), count)], 1) for i in (0, 1)
        )
        text = self.text_embedding(context)
        for block in self.blocks:
            tokens = block(tokens, text, each0, freqs, original_context_length=video, transformer_options=transformer_options)
        patches = self.proj_out(self.norm_out(tokens, each, video))
        grid = [side // p for side, p in zip(x.shape[2:], self.patch_size)]
        return patches.unflatten(1, grid).unflatten(-1, (*self.patch_size, -1)).permute(0, 7, 1, 4, 2, 5, 3, 6).reshape(x.shape)


# -- what lets the host sample them ---------------------------------------------------------------------


class _Format(comfy.latent_formats.LatentFormat):
    def __init__(self, channels: int, dimensions: int) -> None:
        self.latent_channels, self.latent_dimensions = channels, dimensions


class StandIn(comfy.model_base.BaseModel):
    """The host's model around a stand-in. `network` is its class."""

    network: ClassVar[type]

    def __init__(self, config: Any, device: Any = None) -> None:
        super().__init__(config, comfy.model_base.ModelType.FLOW, device=device, unet_model=self.network)

    def extra_conds(self, **kwargs: Any) -> dict:
        out = super().extra_conds(**kwargs)
        out["c_crossattn"] = comfy.conds.CONDRegular(kwargs["cross_attn"])
        return out


def config_of(base: type[StandIn], channels: int, dimensions: int = 2) -> type:
    """Returns a class for `making.tiny`, like those that the host's `supported_models` has for each model."""

    class Config(comfy.supported_models_base.BASE):
        unet_config: ClassVar[dict] = {}
        unet_extra_config: ClassVar[dict] = {}
        sampling_settings: ClassVar[dict] = {"shift": 3.0}
        memory_usage_factor = 1.0

        def latent_format(self) -> Any:
            return _Format(channels, dimensions)

        def get_model(self, *_args: Any, **_more: Any) -> StandIn:
            return base(self)

    return Config


class Ernie(StandIn):
    network = ErnieImageModel


class Helios(StandIn):
    network = HeliosModel

    def extra_conds(self, **kwargs: Any) -> dict:
        out = super().extra_conds(**kwargs)
        past = {name: kwargs[name] for name in kwargs if name.startswith("latents_history_")}
        return out | {name: comfy.conds.CONDRegular(latents) for name, latents in past.items()}

"""A stand-in for Open-Sora 1.2's STDiT3, of which the host has no class: a small model of that structure, and what lets the host sample it.

Written for these tests after the structure of opensora/models/stdit/stdit3.py and models/layers/blocks.py (hpcaitech/Open-Sora): its names
of submodules, the parameters of a block's forward, the order of its sublayers, and what is raw and what is flattened. Attention is torch's
own and the rotation of temporal positions is plain. Sequence parallelism, dropout and training are left out.
"""

from __future__ import annotations

import math
from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


def waves(numbers: Tensor, width: int) -> Tensor:
    """Returns cosines and sines (…, width) of numbers (…)."""
    rates = torch.exp(-math.log(10000) * torch.arange(width // 2, device=numbers.device) / (width // 2))
    phases = numbers.float()[..., None] * rates
    return torch.cat((phases.cos(), phases.sin()), -1)


def frames_of(x: Tensor, x_mask: Tensor, now: Tensor, at_zero: Tensor) -> Tensor:
    """Returns, for each token of x (B, T·S, C), `now` if its frame is sampled and `at_zero` if it is given. x_mask is (B, T)."""
    grid = (x.shape[0], x_mask.shape[1], -1, x.shape[2])
    return torch.where(x_mask[:, :, None, None], now.expand_as(x).reshape(grid), at_zero.expand_as(x).reshape(grid)).flatten(1, 2)


class HeadNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.weight, 1e-6)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int, turns: bool, ops: Any) -> None:
        super().__init__()
        self.heads, self.turns = heads, turns
        self.qkv, self.proj = ops.Linear(width, 3 * width), ops.Linear(width, width)
        self.q_norm, self.k_norm = HeadNorm(width // heads), HeadNorm(width // heads)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if self.turns:
            q, k = self.turned(q), self.turned(k)
        return self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    @staticmethod
    def turned(x: Tensor) -> Tensor:
        cos, sin = waves(torch.arange(x.shape[-2], device=x.device), x.shape[-1]).to(x.dtype).chunk(2, -1)
        a, b = x.chunk(2, -1)
        return torch.cat((a * cos - b * sin, a * sin + b * cos), -1)


class CrossAttention(nn.Module):
    def __init__(self, width: int, heads: int, ops: Any) -> None:
        super().__init__()
        self.heads = heads
        self.q_linear, self.kv_linear, self.proj = ops.Linear(width, width), ops.Linear(width, 2 * width), ops.Linear(width, width)

    def forward(self, x: Tensor, cond: Tensor, mask: list[int] | None = None) -> Tensor:
        """Attends from x to `cond`, the texts of all rows one after the other (1, sum of mask, C). `mask` has the length of each row's."""
        lengths = mask or [cond.shape[1]] * x.shape[0]
        q = self.q_linear(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
        k, v = self.kv_linear(cond)[0].unflatten(-1, (2, self.heads, -1)).permute(1, 2, 0, 3)
        rows = zip(q, k.split(lengths, dim=1), v.split(lengths, dim=1))
        seen = torch.stack([F.scaled_dot_product_attention(*(each[None] for each in row))[0] for row in rows])
        return self.proj(seen.transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, out: int, ops: Any) -> None:
        super().__init__()
        self.fc1, self.fc2 = ops.Linear(width, inner), ops.Linear(inner, out)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class STDiT3Block(nn.Module):
    def __init__(self, width: int, heads: int, temporal: bool, ops: Any) -> None:
        super().__init__()
        self.temporal = temporal
        self.norm1 = ops.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.attn = Attention(width, heads, temporal, ops)
        self.cross_attn = CrossAttention(width, heads, ops)
        self.norm2 = ops.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp = Mlp(width, 4 * width, width, ops)
        self.scale_shift_table = nn.Parameter(torch.zeros(6, width))

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None):  # noqa: N803
        vectors = [self.scale_shift_table + t.unflatten(-1, (6, -1))]
        if x_mask is not None:
            vectors.append(self.scale_shift_table + t0.unflatten(-1, (6, -1)))

        def chosen(change, part: slice) -> Tensor:
            """Applies `change` with this part of the six vectors, which each frame has of its own."""
            results = [change(*each[:, part].split(1, dim=1)) for each in vectors]
            return results[0] if x_mask is None else frames_of(x, x_mask, *results)

        seen = chosen(lambda shift, scale: self.norm1(x) * (1 + scale) + shift, slice(0, 2)).unflatten(1, (T, S))
        if self.temporal:
            seen = self.attn(seen.transpose(1, 2).flatten(0, 1)).unflatten(0, (-1, S)).transpose(1, 2).flatten(1, 2)
        else:
            seen = self.attn(seen.flatten(0, 1)).unflatten(0, (-1, T)).flatten(1, 2)
        x = x + chosen(lambda gate: gate * seen, slice(2, 3))
        x = x + self.cross_attn(x, y, mask)
        done = self.mlp(chosen(lambda shift, scale: self.norm2(x) * (1 + scale) + shift, slice(3, 5)))
        return x + chosen(lambda gate: gate * done, slice(5, 6))


class PatchEmbed3D(nn.Module):
    def __init__(self, patch: tuple[int, int, int], channels: int, width: int, ops: Any) -> None:
        super().__init__()
        self.patch = patch
        self.proj = ops.Conv3d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        missing = [-size % side for size, side in zip(x.shape[2:], self.patch)]
        return self.proj(F.pad(x, (0, missing[2], 0, missing[1], 0, missing[0]))).flatten(2).transpose(1, 2)


class NumberEmbedder(nn.Module):
    def __init__(self, width: int, ops: Any) -> None:
        super().__init__()
        self.mlp = nn.Sequential(ops.Linear(256, width), nn.SiLU(), ops.Linear(width, width))

    def forward(self, numbers: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(waves(numbers, 256).to(dtype))


class CaptionEmbedder(nn.Module):
    def __init__(self, channels: int, width: int, ops: Any) -> None:
        super().__init__()
        self.y_proj = Mlp(channels, width, width, ops)

    def forward(self, caption: Tensor) -> Tensor:
        return self.y_proj(caption)


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int, ops: Any) -> None:
        super().__init__()
        self.norm_final = ops.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = ops.Linear(width, outputs)
        self.scale_shift_table = nn.Parameter(torch.zeros(2, width))

    def forward(self, x: Tensor, t: Tensor, x_mask: Tensor | None, t0: Tensor) -> Tensor:
        times = [t] if x_mask is None else [t, t0]
        pairs = [(self.scale_shift_table + time[:, None]).split(1, dim=1) for time in times]
        results = [self.norm_final(x) * (1 + scale) + shift for shift, scale in pairs]
        return self.linear(results[0] if x_mask is None else frames_of(x, x_mask, *results))


class STDiT3(nn.Module):
    """Takes what the host passes: video (B, C, T, H, W). Its flow, noise minus video, is the answer."""

    def __init__(self, hidden_size, depth, num_heads, in_channels, caption_channels, dtype=None, operations=None, **_kwargs: Any) -> None:
        super().__init__()
        ops, self.dtype, self.in_channels, self.hidden_size, self.patch_size = operations, dtype, in_channels, hidden_size, (1, 2, 2)
        self.x_embedder = PatchEmbed3D(self.patch_size, in_channels, hidden_size, ops)
        self.t_embedder, self.fps_embedder = NumberEmbedder(hidden_size, ops), NumberEmbedder(hidden_size, ops)
        self.t_block = nn.Sequential(nn.SiLU(), ops.Linear(hidden_size, 6 * hidden_size))
        self.y_embedder = CaptionEmbedder(caption_channels, hidden_size, ops)
        self.spatial_blocks = nn.ModuleList(STDiT3Block(hidden_size, num_heads, False, ops) for _ in range(depth))
        self.temporal_blocks = nn.ModuleList(STDiT3Block(hidden_size, num_heads, True, ops) for _ in range(depth))
        self.final_layer = FinalLayer(hidden_size, math.prod(self.patch_size) * 2 * in_channels, ops)  # with a variance

    def forward(self, x, timestep, context=None, mask=None, x_mask=None, **_kwargs: Any) -> Tensor:
        """Takes `mask` of the text (B, tokens), and `x_mask` of sampled frames (B, T), which are numbers if the host has cast them."""
        size = [-(-side // patch) for side, patch in zip(x.shape[2:], self.patch_size)]
        frames, places = size[0], size[1] * size[2]
        x_mask = None if x_mask is None else x_mask > 0.5
        rate = self.fps_embedder(torch.full_like(timestep, 24.0), x.dtype)
        t, t0 = (self.t_embedder(time, x.dtype) + rate for time in (timestep, torch.zeros_like(timestep)))
        y = self.y_embedder(context)
        mask = torch.ones(y.shape[:2], device=y.device) if mask is None else mask
        flat, lengths = y[mask > 0.5][None], (mask > 0.5).sum(1).tolist()
        tokens = (self.x_embedder(x).unflatten(1, (frames, places)) + self.positions(size[1], size[2]).to(x)).flatten(1, 2)
        times = (self.t_block(t), None if x_mask is None else self.t_block(t0))
        for spatial, temporal in zip(self.spatial_blocks, self.temporal_blocks):
            tokens = spatial(tokens, flat, times[0], lengths, x_mask, times[1], frames, places)
            tokens = temporal(tokens, flat, times[0], lengths, x_mask, times[1], frames, places)
        out = self.final_layer(tokens, t, x_mask, t0).unflatten(1, size).unflatten(-1, (*self.patch_size, -1))
        out = out.permute(0, 7, 1, 4, 2, 5, 3, 6).flatten(6, 7).flatten(4, 5).flatten(2, 3)
        return -out[:, : self.in_channels, : x.shape[2], : x.shape[3], : x.shape[4]]

    def positions(self, height: int, width: int) -> Tensor:
        """Returns (1, height · width, C): half of the channels encode the row, half the column."""
        rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
        return torch.cat([waves(axis.flatten(), self.hidden_size // 2) for axis in (rows, columns)], -1)[None]


class OpenSora(comfy.model_base.BaseModel):
    """Holds the network as a node pack would: the text's mask and the given frames come with the conditioning."""

    def __init__(self, config: Any, device: Any = None) -> None:
        super().__init__(config, comfy.model_base.ModelType.FLOW, device=device, unet_model=STDiT3)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        names = {"cross_attn": "c_crossattn", "attention_mask": "mask", "x_mask": "x_mask"}
        given = {name: comfy.conds.CONDRegular(kwargs[key]) for key, name in names.items() if kwargs.get(key) is not None}
        return super().extra_conds(**kwargs) | given


class VideoLatent(comfy.latent_formats.LatentFormat):
    latent_dimensions = 3


class OpenSoraConfig(comfy.supported_models_base.BASE):
    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012 (the host's own way)
    latent_format = VideoLatent

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> OpenSora:
        return OpenSora(self, device=device).eval()

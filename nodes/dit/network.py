"""The DiT network in the host's layers, under the names that the published checkpoints use.

It is written from the paper's equations and those names. x += gate·attn(modulated norm of x), x += gate·mlp(…); every block makes its
shifts, scales and gates from one vector: time plus class. All layers are the host's `operations`, so that the host handles casts, partial
loading, fp8 weights and LoRAs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import comfy.ldm.common_dit
import comfy.ops
import torch
from comfy.ldm.modules.attention import optimized_attention
from einops import rearrange
from torch import Tensor, nn

_PERIOD = 10000.0  # of the slowest wave, in the embeddings of time and of positions


class DiTShape(NamedTuple):
    """The sizes of a DiT, which detect.py finds from the shapes of its weights.

    Args:
        width: Channels of a token.
        depth: Number of blocks.
        heads: Heads of attention.
        mlp_width: Channels inside the MLP.
        patch: Side of the square of the latent that makes a token.
        in_channels: Channels of the latent.
        out_channels: Channels of the prediction: the noise, and in some models its variance.
        grid: Side, in tokens, of the table of positions. 0 for none.
        classes: Number of classes, without the null class, which is the last row of the label table.
        waves: Number of waves in the embedding of time.
    """

    width: int
    depth: int
    heads: int
    mlp_width: int
    patch: int
    in_channels: int
    out_channels: int
    grid: int
    classes: int
    waves: int


class Maker:
    """Makes the host's layers, all in one dtype on one device.

    Args:
        operations: The host's classes of layers.
        dtype, device: Dtype and device of the weights.
    """

    def __init__(self, operations: Any, dtype: torch.dtype | None, device: Any) -> None:
        self.operations, self.more = operations, {"dtype": dtype, "device": device}

    def linear(self, inputs: int, outputs: int) -> nn.Module:
        return self.operations.Linear(inputs, outputs, bias=True, **self.more)

    def norm(self, width: int) -> nn.Module:
        return self.operations.LayerNorm(width, elementwise_affine=False, eps=1e-6, **self.more)

    def modulation(self, width: int, count: int) -> nn.Sequential:
        return nn.Sequential(nn.SiLU(), self.linear(width, count * width))


class Attention(nn.Module):
    def __init__(self, make: Maker, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = make.linear(width, 3 * width)
        self.proj = make.linear(width, width)

    def forward(self, x: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        return self.proj(optimized_attention(q, k, v, self.heads, transformer_options=transformer_options))


class Mlp(nn.Module):
    def __init__(self, make: Maker, width: int, inner: int) -> None:
        super().__init__()
        self.fc1 = make.linear(width, inner)
        self.act = nn.GELU(approximate="tanh")
        self.fc2 = make.linear(inner, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class DiTBlock(nn.Module):
    def __init__(self, make: Maker, shape: DiTShape) -> None:
        super().__init__()
        self.norm1 = make.norm(shape.width)
        self.attn = Attention(make, shape.width, shape.heads)
        self.norm2 = make.norm(shape.width)
        self.mlp = Mlp(make, shape.width, shape.mlp_width)
        self.adaLN_modulation = make.modulation(shape.width, 6)

    def forward(self, x: Tensor, c: Tensor, transformer_options: dict[str, Any]) -> Tensor:
        """Returns the tokens after the block.

        Args:
            x: Tokens (B, L, C).
            c: Time plus class (B, C).
        """
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_attn * self.attn(self.norm1(x) * (1 + scale_attn) + shift_attn, transformer_options=transformer_options)
        return x + gate_mlp * self.mlp(self.norm2(x) * (1 + scale_mlp) + shift_mlp)


class FinalLayer(nn.Module):
    def __init__(self, make: Maker, shape: DiTShape) -> None:
        super().__init__()
        self.norm_final = make.norm(shape.width)
        self.linear = make.linear(shape.width, shape.patch**2 * shape.out_channels)
        self.adaLN_modulation = make.modulation(shape.width, 2)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class TimeEmbedder(nn.Module):
    def __init__(self, make: Maker, shape: DiTShape) -> None:
        super().__init__()
        self.waves = shape.waves
        self.mlp = nn.Sequential(make.linear(shape.waves, shape.width), nn.SiLU(), make.linear(shape.width, shape.width))

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        """Embeds times (B,), 0 to 999, as (B, C)."""
        half = self.waves // 2
        phases = t.float()[:, None] * torch.exp(-math.log(_PERIOD) / half * torch.arange(half, device=t.device))
        return self.mlp(torch.cat((phases.cos(), phases.sin()), dim=-1).to(dtype))


class LabelEmbedder(nn.Module):
    def __init__(self, make: Maker, shape: DiTShape) -> None:
        super().__init__()
        self.embedding_table = make.operations.Embedding(shape.classes + 1, shape.width, **make.more)

    def forward(self, y: Tensor, dtype: torch.dtype) -> Tensor:
        return self.embedding_table(y, out_dtype=dtype).to(dtype)


class PatchEmbedder(nn.Module):
    def __init__(self, make: Maker, shape: DiTShape) -> None:
        super().__init__()
        side = shape.patch
        self.proj = make.operations.Conv2d(shape.in_channels, shape.width, kernel_size=side, stride=side, bias=True, **make.more)

    def forward(self, x: Tensor) -> Tensor:
        """Makes tokens of a latent: (B, C, H, W) -> (B, rows, columns, width)."""
        return self.proj(x).movedim(1, -1)


class DiT(nn.Module):
    """Predicts the noise (B, in_channels, H, W) in a latent. The variance that a checkpoint also predicts is dropped."""

    def __init__(self, shape: DiTShape, dtype: torch.dtype | None = None, device: Any = None, operations: Any = None, **_more: Any) -> None:
        super().__init__()
        make = Maker(operations or comfy.ops.disable_weight_init, dtype, device)
        self.shape, self.dtype = shape, dtype
        self.x_embedder = PatchEmbedder(make, shape)
        self.t_embedder = TimeEmbedder(make, shape)
        self.y_embedder = LabelEmbedder(make, shape)
        # In float32, whatever the dtype of the weights: it is small, and fp8 would spoil it.
        table = nn.Parameter(torch.empty(1, shape.grid**2, shape.width, device=device), requires_grad=False) if shape.grid else None
        self.register_parameter("pos_embed", table)
        self.blocks = nn.ModuleList(DiTBlock(make, shape) for _ in range(shape.depth))
        self.final_layer = FinalLayer(make, shape)

    def forward(self, x: Tensor, timesteps: Tensor, y: Tensor, transformer_options: dict[str, Any] = {}, **_more: Any) -> Tensor:  # noqa: B006
        """Returns the noise, in the shape of `x`.

        Args:
            x: Latents (B, in_channels, H, W).
            timesteps: Times (B,), 0 to 999.
            y: Classes (B,), whole numbers.
        """
        height, width = x.shape[-2:]
        side = self.shape.patch
        tokens = self.x_embedder(comfy.ldm.common_dit.pad_to_patch_size(x, (side, side)))
        rows, columns = tokens.shape[1:3]
        tokens = rearrange(tokens, "B rows columns C -> B (rows columns) C") + self._places(rows, columns, tokens)
        c = self.t_embedder(timesteps, x.dtype) + self.y_embedder(y, x.dtype)
        for block in self.blocks:
            tokens = block(tokens, c, transformer_options=transformer_options)
        out = rearrange(self.final_layer(tokens, c), "B (H W) (h w C) -> B C (H h) (W w)", H=rows, W=columns, h=side, w=side)
        return out[:, : self.shape.in_channels, :height, :width]

    def _places(self, rows: int, columns: int, like: Tensor) -> Tensor:
        """Returns the checkpoint's table of positions where it fits. For other sizes the same waves are computed."""
        if rows == columns == self.shape.grid:
            return comfy.ops.cast_to_input(self.pos_embed, like)
        return places(rows, columns, self.shape.width, like.device).to(like.dtype)


def places(rows: int, columns: int, width: int, device: torch.device | None = None) -> Tensor:
    """Returns the position of every token (1, rows · columns, width): a quarter each of sine and cosine of column, then of row."""
    rates = torch.exp(-math.log(_PERIOD) / (width // 4) * torch.arange(width // 4, device=device))

    def waves(count: int) -> Tensor:
        phases = torch.arange(count, device=device)[:, None] * rates
        return torch.cat((phases.sin(), phases.cos()), dim=-1)

    across = waves(columns)[None].expand(rows, -1, -1)
    down = waves(rows)[:, None].expand(-1, columns, -1)
    return rearrange(torch.cat((across, down), dim=-1), "rows columns C -> 1 (rows columns) C")

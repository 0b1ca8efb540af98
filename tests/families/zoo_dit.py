"""Makes a small class-conditional DiT for zoo.py with the pack's own classes, as the host has none.

Below it are stand-ins for the `DiT`, `PixArt` and `PixArtMS` of the public ExtraModels pack, written after the structure of its
DiT/model.py, PixArt/models/PixArt.py and PixArtMS.py: the same names of modules in plain torch layers, and blocks that are called as there.
The pack's own network is compared with the stand-in of DiT.
"""

from __future__ import annotations

import math
from functools import cache
from pathlib import Path
from typing import ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.supported_models_base
import safetensors.torch
import torch
import torch.nn.functional as F  # noqa: N812
from comfy.model_patcher import ModelPatcher
from comfyui_duca.nodes.dit.model import DiTConfig
from comfyui_duca.nodes.dit.network import DiTShape
from comfyui_duca.nodes.imagenet_class import class_conditioning
from making import Case, text, tiny
from torch import Tensor, nn
from zoo_image import normal

SHAPE = DiTShape(width=64, depth=3, heads=2, mlp_width=256, patch=2, in_channels=4, out_channels=8, grid=8, classes=10, waves=32)


def dit(**changes: int) -> ModelPatcher:
    """Returns a DiT with the published table of positions and random weights."""
    shape = SHAPE._replace(**changes)
    model = tiny(DiTConfig, shape=shape)
    if shape.grid:
        model.model.diffusion_model.pos_embed.data.copy_(table(shape.grid, shape.grid, shape.width))
    return model


CASES = (Case("dit", dit, (4, 12, 16), class_conditioning, lambda m: m.blocks[-1]),)


# --- stand-ins


@cache
def table(rows: int, columns: int, width: int, scale: float = 1.0) -> Tensor:
    """Returns positions (1, rows · columns, width), each computed in float64."""
    result = torch.zeros(rows * columns, width, dtype=torch.float64)
    for token in range(rows * columns):
        for part, place in enumerate((token % columns, token // columns)):
            for wave in range(width // 4):
                phase = place * scale / 10000 ** (wave / (width // 4))
                result[token, part * width // 2 + wave] = math.sin(phase)
                result[token, part * width // 2 + width // 4 + wave] = math.cos(phase)
    return result[None].float()


def linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """Splits (B, L, C) into (B, heads, L, C / heads)."""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


class Patches(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(4, width, 2, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x).flatten(2).transpose(1, 2)


class Number(nn.Module):
    def __init__(self, width: int, waves: int) -> None:
        super().__init__()
        self.waves, self.mlp = waves, nn.Sequential(linear(waves, width), nn.SiLU(), linear(width, width))

    def forward(self, t: Tensor) -> Tensor:
        half = self.waves // 2
        rates = 10000.0 ** -(torch.arange(half, dtype=torch.float64) / half)
        phases = t.double()[:, None] * rates[None]
        return self.mlp(torch.cat((phases.cos(), phases.sin()), 1).to(self.mlp[0].weight.dtype))


class Labels(nn.Module):
    def __init__(self, classes: int, width: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(classes + 1, width)

    def forward(self, y: Tensor) -> Tensor:
        return self.embedding_table(y)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.qkv, self.proj = heads, linear(width, 3 * width), linear(width, width)

    def forward(self, x: Tensor, HW: tuple[int, int] | None = None) -> Tensor:  # noqa: N803
        rows, length, width = x.shape
        q, k, v = self.qkv(x).reshape(rows, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        weights = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).softmax(-1)
        return self.proj((weights @ v).transpose(1, 2).reshape(x.shape))


class CrossAttention(nn.Module):
    """Attends with all rows in one, masked so that each sees its own text. The number of a row's tokens is read from the queries."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.q_linear, self.kv_linear, self.proj = heads, linear(width, width), linear(width, 2 * width), linear(width, width)

    def forward(self, x: Tensor, y: Tensor, lengths: list[int]) -> Tensor:
        q = split_heads(self.q_linear(x).reshape(1, -1, x.shape[-1]), self.heads)
        k, v = (split_heads(part, self.heads) for part in self.kv_linear(y).chunk(2, -1))
        mask = torch.block_diag(*[torch.ones(x.shape[1], length) for length in lengths]).bool()
        return self.proj(F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).reshape(x.shape))


class Mlp(nn.Module):
    def __init__(self, width: int, inner: int, outputs: int) -> None:
        super().__init__()
        self.fc1, self.act, self.fc2 = linear(width, inner), nn.GELU(approximate="tanh"), linear(inner, outputs)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(width, elementwise_affine=False, eps=1e-6) for _ in range(2))
        self.attn, self.mlp = SelfAttention(width, heads), Mlp(width, inner, width)


class DiTBlock(Block):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__(width, heads, inner)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = (part.unsqueeze(1) for part in self.adaLN_modulation(c).chunk(6, dim=1))
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class PixArtBlock(Block):
    def __init__(self, width: int, heads: int, inner: int) -> None:
        super().__init__(width, heads, inner)
        self.cross_attn = CrossAttention(width, heads)
        self.scale_shift_table = nn.Parameter(torch.randn(6, width))

    def forward(self, x: Tensor, y: Tensor, t: Tensor, mask: list[int], HW: tuple[int, int] | None = None) -> Tensor:  # noqa: N803
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.scale_shift_table[None] + t.reshape(len(x), 6, -1)).chunk(6, dim=1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1, HW=HW)
        x = x + self.cross_attn(x, y, mask)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class Head(nn.Module):
    """The final layer. DiT's has a projection of its own, PixArt's a table."""

    def __init__(self, width: int, outputs: int, is_dit: bool) -> None:
        super().__init__()
        self.norm_final = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.linear = linear(width, outputs)
        if is_dit:
            self.adaLN_modulation = nn.Sequential(nn.SiLU(), linear(width, 2 * width))
        else:
            self.scale_shift_table = nn.Parameter(torch.randn(2, width))

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        both = self.adaLN_modulation(t).unflatten(1, (2, -1)) if hasattr(self, "adaLN_modulation") else self.scale_shift_table + t[:, None]
        return self.linear(self.norm_final(x) * (1 + both[:, 1:]) + both[:, :1])


class DiT(nn.Module):
    """The DiT, and what PixArt shares with it. `raw` returns all output channels for a latent (B, 4, H, W)."""

    def __init__(self, shape: DiTShape = SHAPE) -> None:
        super().__init__()
        self.patch, self.dtype = shape.patch, torch.float32
        self.x_embedder = Patches(shape.width)
        self.x_embedder.proj = nn.Conv2d(4, shape.width, shape.patch, shape.patch)
        self.t_embedder = Number(shape.width, shape.waves)
        self.y_embedder = Labels(shape.classes, shape.width)
        self.pos_embed = nn.Parameter(torch.zeros(1, shape.grid**2, shape.width), requires_grad=False)
        self.blocks = nn.ModuleList([DiTBlock(shape.width, shape.heads, shape.mlp_width) for _ in range(shape.depth)])
        self.final_layer = Head(shape.width, shape.patch**2 * shape.out_channels, is_dit=True)

    def raw(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        tokens, c = self.x_embedder(x) + self.pos_embed, self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            tokens = block(tokens, c)
        return self.unpatchify(self.final_layer(tokens, c), x)

    def unpatchify(self, tokens: Tensor, x: Tensor) -> Tensor:
        side, rows, columns = self.patch, x.shape[2] // self.patch, x.shape[3] // self.patch
        return torch.einsum("nhwpqc->nchpwq", tokens.reshape(len(x), rows, columns, side, side, -1)).reshape(len(x), -1, *x.shape[2:])

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_more) -> Tensor:
        return self.raw(x, timesteps, context[:, 0].to(torch.int))[:, :4]


class PixArt(DiT):
    """PixArt for one size."""

    def __init__(self, rows: int = 6, columns: int = 8, width: int = 48) -> None:
        nn.Module.__init__(self)
        self.patch, self.dtype, self.grid, self.width = 2, torch.float32, (rows, columns), width
        self.x_embedder, self.t_embedder, self.y_embedder = Patches(width), Number(width, 32), nn.Module()
        self.y_embedder.y_proj = Mlp(24, width, width)
        self.t_block = nn.Sequential(nn.SiLU(), linear(width, 6 * width))
        self.blocks = nn.ModuleList([PixArtBlock(width, 2, 4 * width) for _ in range(3)])
        self.final_layer = Head(width, 4 * 8, is_dit=False)

    def time(self, t: Tensor, _x: Tensor) -> Tensor:
        return self.t_embedder(t)

    def forward(self, x: Tensor, timesteps: Tensor, context: Tensor, **_more) -> Tensor:
        rows, columns = x.shape[2] // 2, x.shape[3] // 2
        t, lengths = self.time(timesteps, x), [context.shape[1]] * len(x)
        tokens = self.x_embedder(x) + table(rows, columns, self.width)
        y = self.y_embedder.y_proj(context).view(1, -1, self.width)
        for block in self.blocks:
            tokens = block(tokens, y, self.t_block(t), lengths, *self.sizes(rows, columns))
        return self.unpatchify(self.final_layer(tokens, t), x)[:, :4]

    def sizes(self, _rows: int, _columns: int) -> tuple:
        return ()


class PixArtMS(PixArt):
    """PixArt for any size, which it gets as an argument."""

    def __init__(self) -> None:
        super().__init__()
        self.csize_embedder, self.ar_embedder = Number(16, 32), Number(16, 32)

    def time(self, t: Tensor, x: Tensor) -> Tensor:
        numbers = [self.csize_embedder(torch.full((len(x),), 8.0 * side)) for side in x.shape[2:]]
        return self.t_embedder(t) + torch.cat((*numbers, self.ar_embedder(torch.full((len(x),), x.shape[2] / x.shape[3]))), 1)

    def sizes(self, rows: int, columns: int) -> tuple:
        return ((rows, columns),)


class _Config(comfy.supported_models_base.BASE):
    unet_config: ClassVar = {}
    unet_extra_config: ClassVar = {"disable_unet_model_creation": True}
    latent_format = comfy.latent_formats.SD15
    sampling_settings: ClassVar = DiTConfig.sampling_settings


def extra_model(network: nn.Module) -> ModelPatcher:
    """Returns a stand-in with random weights as ExtraModels makes a MODEL: the host's BaseModel with the network put in."""
    for i, (name, weight) in enumerate(network.named_parameters()):
        weight.data = normal(i, *weight.shape) * (weight[0].numel() ** -0.5 if weight.ndim > 1 and "table" not in name else 0.1)
    model = comfy.model_base.BaseModel(_Config({}))
    model.diffusion_model = network.eval()
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def _label(seed: int) -> list:
    return [[torch.tensor([[seed]]), {}]]


EXTRA_MODELS = (
    Case("dit", lambda: extra_model(DiT(SHAPE._replace(grid=6))), (4, 12, 12), _label, lambda m: m.blocks[-1]),
    Case("pixart", lambda: extra_model(PixArt()), (4, 12, 16), text(7, 24), lambda m: m.blocks[-1]),
    Case("pixart", lambda: extra_model(PixArtMS()), (4, 12, 16), text(7, 24), lambda m: m.blocks[-1]),
)


# --- what the tests share


def network_of(model: ModelPatcher) -> nn.Module:
    return model.model.diffusion_model


def plain_of(network: nn.Module, rows: int = SHAPE.grid, columns: int = SHAPE.grid) -> DiT:
    """Returns the same weights in plain layers and float64, for latents of this many tokens."""
    plain = DiT(network.shape).double()
    weights = {name: weight.double() for name, weight in network.state_dict().items() if name != "pos_embed"}
    places = network.pos_embed if rows == columns == network.shape.grid else table(rows, columns, network.shape.width)
    plain.pos_embed.data = places.double()
    plain.load_state_dict(weights | {"pos_embed": plain.pos_embed})
    return plain.requires_grad_(False)


def weights_of(**changes: int) -> dict[str, torch.Tensor]:
    return {name: weight.clone() for name, weight in network_of(dit(**changes)).state_dict().items()}


def shapes_of(weights: dict[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(weight.shape) for name, weight in weights.items()}


def saved(path: Path, content) -> Path:
    (torch.save if path.suffix == ".pt" else safetensors.torch.save_file)(content, path)
    return path


def assert_near(result: torch.Tensor, expected: torch.Tensor, tolerance: float = 2e-5) -> None:
    assert (result.double() - expected).abs().max() / expected.abs().max() < tolerance

"""A stand-in for Open-Sora 2's MMDiTModel, of which the host has no class: a small model of that structure that the host can sample.

Written for these tests after the structure of opensora/models/mmdit/model.py and layers.py (hpcaitech/Open-Sora): its names of submodules,
processors that do the blocks' work, fused and separate q, k and v, and `cond_in`. Positions and attention are those of the host's FLUX,
from which that model was made. Checkpointing and distribution are left out.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import comfy.conds
import comfy.model_base
import comfy.supported_models_base
import torch
from comfy.ldm.flux.layers import EmbedND, timestep_embedding
from comfy.ldm.flux.math import attention
from stand_in_stdit import HeadNorm, VideoLatent
from torch import Tensor, nn


class Modulation(NamedTuple):
    shift: Tensor
    scale: Tensor
    gate: Tensor

    def of(self, x: Tensor) -> Tensor:
        return x * (1 + self.scale) + self.shift


class Modulator(nn.Module):
    def __init__(self, width: int, number: int, ops: Any) -> None:
        super().__init__()
        self.number, self.lin = number, ops.Linear(width, 3 * number * width)

    def forward(self, vec: Tensor) -> tuple[Modulation, Modulation | None]:
        vectors = self.lin(nn.functional.silu(vec))[:, None].chunk(3 * self.number, dim=-1)
        return Modulation(*vectors[:3]), Modulation(*vectors[3:]) if self.number == 2 else None


class QKNorm(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.query_norm, self.key_norm = HeadNorm(width), HeadNorm(width)


class SelfAttention(nn.Module):
    def __init__(self, width: int, heads: int, fused_qkv: bool, ops: Any) -> None:
        super().__init__()
        self.fused_qkv = fused_qkv
        if fused_qkv:
            self.qkv = ops.Linear(width, 3 * width)
        else:
            self.q_proj, self.k_proj, self.v_proj = (ops.Linear(width, width) for _ in range(3))
        self.norm, self.proj = QKNorm(width // heads), ops.Linear(width, width)


def heads_of(parts: Any, heads: int, norm: QKNorm) -> list[Tensor]:
    """Returns q, k and v as (B, heads, L, D), with the norms applied."""
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts)
    return [norm.query_norm(q), norm.key_norm(k), v]


class DoubleStreamBlockProcessor:
    def __call__(self, block: Any, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor) -> tuple[Tensor, Tensor]:
        streams = {"txt": txt, "img": img}
        mods = {name: getattr(block, f"{name}_mod")(vec) for name in streams}
        joint = []
        for name, x in streams.items():
            own, x = getattr(block, f"{name}_attn"), mods[name][0].of(getattr(block, f"{name}_norm1")(x))
            parts = own.qkv(x).chunk(3, -1) if own.fused_qkv else (own.q_proj(x), own.k_proj(x), own.v_proj(x))
            joint.append(heads_of(parts, block.num_heads, own.norm))
        seen = attention(*(torch.cat(pair, dim=2) for pair in zip(*joint)), pe=pe).split((txt.shape[1], img.shape[1]), dim=1)
        for (name, x), own in zip(list(streams.items()), seen):
            first, second = mods[name]
            x = x + first.gate * getattr(block, f"{name}_attn").proj(own)
            streams[name] = x + second.gate * getattr(block, f"{name}_mlp")(second.of(getattr(block, f"{name}_norm2")(x)))
        return streams["img"], streams["txt"]


class SingleStreamBlockProcessor:
    def __call__(self, block: Any, x: Tensor, vec: Tensor, pe: Tensor) -> Tensor:
        mod, _ = block.modulation(vec)
        inner, width = mod.of(block.pre_norm(x)), block.hidden_size
        if block.fused_qkv:
            *parts, mlp = block.linear1(inner).split((width, width, width, 4 * width), dim=-1)
        else:
            v, mlp = block.v_mlp(inner).split((width, 4 * width), dim=-1)
            parts = [block.q_proj(inner), block.k_proj(inner), v]
        seen = attention(*heads_of(parts, block.num_heads, block.norm), pe=pe)
        return x + mod.gate * block.linear2(torch.cat((seen, block.mlp_act(mlp)), dim=-1))


class DoubleStreamBlock(nn.Module):
    def __init__(self, width: int, heads: int, fused_qkv: bool, ops: Any) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.processor = width, heads, DoubleStreamBlockProcessor()
        for name in ("img", "txt"):
            setattr(self, f"{name}_mod", Modulator(width, 2, ops))
            setattr(self, f"{name}_norm1", ops.LayerNorm(width, eps=1e-6, elementwise_affine=False))
            setattr(self, f"{name}_attn", SelfAttention(width, heads, fused_qkv, ops))
            setattr(self, f"{name}_norm2", ops.LayerNorm(width, eps=1e-6, elementwise_affine=False))
            gelu = nn.GELU(approximate="tanh")
            setattr(self, f"{name}_mlp", nn.Sequential(ops.Linear(width, 4 * width), gelu, ops.Linear(4 * width, width)))

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, pe: Tensor, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return self.processor(self, img, txt, vec, pe)


class SingleStreamBlock(nn.Module):
    def __init__(self, width: int, heads: int, fused_qkv: bool, ops: Any) -> None:
        super().__init__()
        self.hidden_size, self.num_heads, self.fused_qkv, self.processor = width, heads, fused_qkv, SingleStreamBlockProcessor()
        if fused_qkv:
            self.linear1 = ops.Linear(width, 7 * width)
        else:
            self.q_proj, self.k_proj, self.v_mlp = ops.Linear(width, width), ops.Linear(width, width), ops.Linear(width, 5 * width)
        self.linear2, self.norm = ops.Linear(5 * width, width), QKNorm(width // heads)
        self.pre_norm = ops.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.mlp_act, self.modulation = nn.GELU(approximate="tanh"), Modulator(width, 1, ops)

    def forward(self, x: Tensor, vec: Tensor, pe: Tensor, **_kwargs: Any) -> Tensor:
        return self.processor(self, x, vec, pe)


class MLPEmbedder(nn.Module):
    def __init__(self, inputs: int, width: int, ops: Any) -> None:
        super().__init__()
        self.in_layer, self.silu, self.out_layer = ops.Linear(inputs, width), nn.SiLU(), ops.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(self.silu(self.in_layer(x)))


class LastLayer(nn.Module):
    def __init__(self, width: int, outputs: int, ops: Any) -> None:
        super().__init__()
        self.norm_final = ops.LayerNorm(width, eps=1e-6, elementwise_affine=False)
        self.linear = ops.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), ops.Linear(width, 2 * width))

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(self.norm_final(x) * (1 + scale) + shift)


class MMDiTModel(nn.Module):
    """Takes what the host passes: video (B, C, T, H, W), in which 2 × 2 numbers of a frame make a token."""

    def __init__(self, hidden_size, num_heads, depth, in_channels, context_in_dim, fused_qkv, dtype=None, operations=None, **_kwargs):
        super().__init__()
        ops, self.dtype, self.in_channels, self.hidden_size = operations, dtype, in_channels, hidden_size
        self.pe_embedder = EmbedND(hidden_size // num_heads, 10000, [4, 4, 8])
        self.img_in, self.txt_in = ops.Linear(in_channels, hidden_size), ops.Linear(context_in_dim, hidden_size)
        self.cond_in = ops.Linear(in_channels + 4, hidden_size)
        self.time_in, self.vector_in = MLPEmbedder(256, hidden_size, ops), MLPEmbedder(8, hidden_size, ops)
        self.guidance_in = nn.Identity()
        sizes = hidden_size, num_heads, fused_qkv, ops
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(*sizes) for _ in range(depth))
        self.single_blocks = nn.ModuleList(SingleStreamBlock(*sizes) for _ in range(depth))
        self.final_layer = LastLayer(hidden_size, in_channels, ops)

    def forward(self, x: Tensor, timestep: Tensor, context: Tensor, y: Tensor, **_kwargs: Any) -> Tensor:
        cells = x.unflatten(3, (-1, 2)).unflatten(5, (-1, 2)).permute(0, 2, 3, 5, 1, 4, 6)  # B, T, H, W, C, 2, 2
        size = cells.shape[1:4]
        axes = torch.meshgrid(*(torch.arange(side, dtype=torch.float32) for side in size), indexing="ij")
        ids = torch.cat((torch.zeros(context.shape[1], 3), torch.stack(axes, -1).flatten(0, 2)))[None].repeat(x.shape[0], 1, 1)
        img, txt = cells.flatten(4).flatten(1, 3), self.txt_in(context)
        given = torch.cat((img.new_full(img.shape, 0.5), img.new_ones(*img.shape[:2], 4)), -1)  # a picture and where it is
        img, pe = self.img_in(img) + self.cond_in(given), self.pe_embedder(ids)
        vec = self.time_in(timestep_embedding(timestep, 256).to(img)) + self.vector_in(y)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, pe)
        img = torch.cat((txt, img), 1)
        for block in self.single_blocks:
            img = block(img, vec, pe)
        out = self.final_layer(img[:, txt.shape[1] :], vec).unflatten(1, size).unflatten(-1, (-1, 2, 2))
        return out.permute(0, 4, 1, 2, 5, 3, 6).flatten(5).flatten(3, 4)


class OpenSora2(comfy.model_base.BaseModel):
    """Holds the network as a node pack would: the pooled text comes with the conditioning."""

    def __init__(self, config: Any, device: Any = None) -> None:
        super().__init__(config, comfy.model_base.ModelType.FLUX, device=device, unet_model=MMDiTModel)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        own = {"c_crossattn": comfy.conds.CONDRegular(kwargs["cross_attn"]), "y": comfy.conds.CONDRegular(kwargs["pooled_output"])}
        return super().extra_conds(**kwargs) | own


class OpenSora2Config(comfy.supported_models_base.BASE):
    unet_extra_config: dict[str, Any] = {}  # noqa: RUF012 (the host's own way)
    latent_format = VideoLatent

    def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> OpenSora2:
        return OpenSora2(self, device=device).eval()

"""Stand-ins for HiDream-O1 and MiniMax H3, whose blocks write into what they are given (see stand_in_ernie_helios.py).

MiniMax H3 makes its outputs first and fills them last, as the host does when it plans its memory. The plan itself is left out.
"""

from __future__ import annotations

from typing import Any

import comfy.conds
import torch
import torch.nn.functional as F  # noqa: N812
from stand_in_ernie_helios import Ops, StandIn, angles, attend, turned, waves
from torch import Tensor, nn

TMS = 1  # the noise level takes the place of this token of HiDream-O1

# -- HiDream-O1 -----------------------------------------------------------------------------------------------


class DecoderAttention(nn.Module):
    """Has fewer keys and values than queries. Keys and values of earlier tokens come and go in `past_key_value`."""

    def __init__(self, width: int, heads: int, kv_heads: int, ops: Ops) -> None:
        super().__init__()
        self.heads, self.kv_heads, size = heads, kv_heads, width // heads
        self.q_proj, self.o_proj = ops.Linear(width, width, bias=False), ops.Linear(width, width, bias=False)
        self.k_proj, self.v_proj = (ops.Linear(width, kv_heads * size, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = ops.RMSNorm(size), ops.RMSNorm(size)

    def forward(self, hidden_states: Tensor, attention_mask: Any, freqs_cis: Tensor, optimized_attention: Any, past_key_value: Any):
        q = self.q_proj(hidden_states).unflatten(-1, (self.heads, -1))
        k, v = (layer(hidden_states).unflatten(-1, (self.kv_heads, -1)) for layer in (self.k_proj, self.v_proj))
        q, k = turned(self.q_norm(q), freqs_cis), turned(self.k_norm(k), freqs_cis)
        k, v, present = k.transpose(1, 2), v.transpose(1, 2), None
        if past_key_value is not None:
            if len(past_key_value):
                k, v = torch.cat((past_key_value[0], k), 2), torch.cat((past_key_value[1], v), 2)
            present = (k, v, k.shape[2])
        k, v = (part.transpose(1, 2).repeat_interleave(self.heads // self.kv_heads, dim=2) for part in (k, v))
        return self.o_proj(optimized_attention(q, k, v)), present


class DecoderMlp(nn.Module):
    def __init__(self, width: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = ops.Linear(width, inner, bias=False), ops.Linear(width, inner, bias=False)
        self.down_proj = ops.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class DecoderBlock(nn.Module):
    def __init__(self, width: int, inner: int, heads: int, kv_heads: int, ops: Ops) -> None:
        super().__init__()
        self.self_attn, self.mlp = DecoderAttention(width, heads, kv_heads, ops), DecoderMlp(width, inner, ops)
        self.input_layernorm, self.post_attention_layernorm = ops.RMSNorm(width), ops.RMSNorm(width)

    def forward(self, x: Tensor, attention_mask: Any = None, freqs_cis: Any = None, optimized_attention: Any = None,
                past_key_value: Any = None):  # fmt: skip
        output = x
        attended, present = self.self_attn(self.input_layernorm(x), attention_mask, freqs_cis, optimized_attention, past_key_value)
        x = x + attended
        return torch.add(x, self.mlp(self.post_attention_layernorm(x)), out=output), present


class Decoder(nn.Module):
    def __init__(self, vocabulary: int, width: int, inner: int, heads: int, layers: int, ops: Ops) -> None:
        super().__init__()
        self.embed_tokens, self.norm = ops.Embedding(vocabulary, width), ops.RMSNorm(width)
        self.layers = nn.ModuleList([DecoderBlock(width, inner, heads, heads // 2, ops) for _ in range(layers)])


class PixelPatches(nn.Module):
    def __init__(self, numbers: int, between: int, width: int, ops: Ops) -> None:
        super().__init__()
        self.proj1, self.proj2 = ops.Linear(numbers, between, bias=False), ops.Linear(between, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj2(self.proj1(x))


class PixelHead(nn.Module):
    def __init__(self, width: int, numbers: int, ops: Ops) -> None:
        super().__init__()
        self.linear = ops.Linear(width, numbers)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Number(nn.Module):
    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.mlp = nn.Sequential(ops.Linear(width, width), nn.SiLU(), ops.Linear(width, width))
        self.width = width

    def forward(self, t: Tensor, dtype: torch.dtype) -> Tensor:
        return self.mlp(waves(t, self.width).to(dtype))


def two_pass(own: int):
    """Lets text before the noise level's token see what precedes it, and everything after it see all tokens."""

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if q.shape[1] < k.shape[1]:
            return attend(q, k, v)
        return torch.cat((attend(q[:, :own], k[:, :own], v[:, :own], causal=True), attend(q[:, own:], k, v)), 1)

    return attention


class HiDreamO1Transformer(nn.Module):
    def __init__(self, hidden_size=48, inner=96, heads=4, num_layers=3, patch_size=8, dtype=None, device=None, operations=None,
                 **_more: Any) -> None:  # fmt: skip
        super().__init__()
        ops, numbers = Ops(operations, dtype, device), 3 * patch_size**2
        self.dtype, self.hidden_size, self.patch_size, self.tms_token_id = dtype, hidden_size, patch_size, TMS
        self.visual, self.head_size = nn.Identity(), hidden_size // heads
        self.language_model = Decoder(32, hidden_size, inner, heads, num_layers, ops)
        self.t_embedder1 = Number(hidden_size, ops)
        self.x_embedder = PixelPatches(numbers, hidden_size // 4, hidden_size, ops)
        self.final_layer2 = PixelHead(hidden_size, numbers, ops)
        self._kv_cache_entries: list[dict] = []

    def clear_kv_cache(self) -> None:
        self._kv_cache_entries = []

    def forward(self, x: Tensor, timesteps: Tensor, context: Any = None, transformer_options: Any = {}, input_ids: Any = None,  # noqa: B006
                ref_patches: Any = None, ar_len: int = 0, **_more: Any) -> Tensor:  # fmt: skip
        p, model = self.patch_size, self.language_model
        z = x.unfold(2, p, p).unfold(3, p, p).permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
        visual = z if ref_patches is None else torch.cat((z, ref_patches), 1)
        text = model.embed_tokens(input_ids).to(x.dtype)
        level = self.t_embedder1(1 - timesteps / 1000, x.dtype)
        text = torch.where((input_ids == self.tms_token_id)[..., None], level[:, None], text)
        tokens = torch.cat((text, self.x_embedder(visual)), 1)
        freqs = angles(torch.arange(tokens.shape[1])[None], self.head_size)
        kept = next((entry for entry in self._kv_cache_entries if torch.equal(entry["input_ids"], input_ids)), None)
        past = ar_len if kept is not None else 0
        tokens, freqs, filled = tokens[:, past:], freqs[:, past:], []
        for i, layer in enumerate(model.layers):
            cached = () if kept is None else (*kept["kv"][i], past)
            tokens, present = layer(
                x=tokens, attention_mask=None, freqs_cis=freqs, optimized_attention=two_pass(ar_len), past_key_value=cached
            )
            if kept is None:
                k, v, _ = present
                filled.append((k[:, :, :ar_len].contiguous(), v[:, :, :ar_len].contiguous()))
        if kept is None:
            self._kv_cache_entries = [*self._kv_cache_entries, {"input_ids": input_ids.clone(), "kv": filled}][-2:]
        start = input_ids.shape[1] - past
        patches = self.final_layer2(model.norm(tokens)[:, start : start + z.shape[1]])
        picture = patches.unflatten(1, (x.shape[2] // p, -1)).unflatten(-1, (3, p, p)).permute(0, 3, 1, 4, 2, 5).reshape(x.shape)
        return (x - picture) / (timesteps / 1000).view(-1, 1, 1, 1).clamp_min(1e-3)


class HiDreamO1(StandIn):
    """Takes `text_input_ids` (1, n) and `ref_patches` (1, m, numbers) beside the prompt."""

    network = HiDreamO1Transformer

    def extra_conds(self, **kwargs: Any) -> dict:
        out, ids = super().extra_conds(**kwargs), kwargs["text_input_ids"]
        out["input_ids"], out["ar_len"] = comfy.conds.CONDRegular(ids), comfy.conds.CONDConstant(ids.shape[1] - 1)
        if kwargs.get("ref_patches") is not None:
            out["ref_patches"] = comfy.conds.CONDRegular(kwargs["ref_patches"])
        return out


# -- MiniMax H3 -------------------------------------------------------------------------------------------------


class PackedAttention(nn.Module):
    def __init__(self, width: int, heads: int, gate_compress: bool, ops: Ops) -> None:
        super().__init__()
        self.heads = heads
        self.qkv_proj, self.out_proj = ops.Linear(width, 3 * width, bias=False), ops.Linear(width, width, bias=False)
        self.q_norm, self.k_norm = ops.RMSNorm(width // heads), ops.RMSNorm(width // heads)
        self.to_gate_compress = ops.Linear(width, width, bias=False) if gate_compress else None

    def forward(self, x: Tensor, rope_freqs: Any = None, transformer_options: Any = {}) -> Tensor:  # noqa: B006
        q, k, v = (part.unflatten(-1, (self.heads, -1))[None] for part in self.qkv_proj(x).chunk(3, -1))
        return self.out_proj(attend(turned(self.q_norm(q), rope_freqs), turned(self.k_norm(k), rope_freqs), v)[0])


class PackedMlp(nn.Module):
    def __init__(self, width: int, inner: int, ops: Ops) -> None:
        super().__init__()
        self.fc1, self.fc2 = ops.Linear(width, 2 * inner, bias=False), ops.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, -1)
        return self.fc2(F.silu(gate) * value)


class Modulation(nn.Module):
    """Makes, from the distinct noise levels (M, t), `expand` tensors with a row for every level and modality."""

    def __init__(self, t_dim: int, width: int, expand: int, modalities: int, ops: Ops) -> None:
        super().__init__()
        self.expand, self.modalities = expand, modalities
        self.linear = ops.Linear(t_dim, expand * width * modalities)

    def forward(self, t_emb: Tensor) -> tuple[Tensor, ...]:
        return self.linear(F.silu(t_emb)).reshape(t_emb.shape[0] * self.modalities, -1).chunk(self.expand, -1)


class PackedBlock(nn.Module):
    def __init__(self, width: int, heads: int, inner: int, t_dim: int, gate_compress: bool, ops: Ops) -> None:
        super().__init__()
        self.norm1, self.norm2 = ops.RMSNorm(width), ops.RMSNorm(width)
        self.attn, self.mlp = PackedAttention(width, heads, gate_compress, ops), PackedMlp(width, inner, ops)
        self.adaln_proj = Modulation(t_dim, width, 6, 3, ops)

    def forward(self, x: Tensor, t_emb: Tensor, mod_segments: list, rope_freqs: Tensor, transformer_options: Any = {},  # noqa: B006
                attention: Any = None) -> Tensor:  # fmt: skip
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.adaln_proj(t_emb)
        attention = self.attn if attention is None else attention
        normed = modulated(self.norm1(x), shift, scale, mod_segments)
        gated(x, gate, attention(normed, rope_freqs=rope_freqs, transformer_options=transformer_options), mod_segments)
        return gated(x, gate_mlp, self.mlp(modulated(self.norm2(x), shift_mlp, scale_mlp, mod_segments)), mod_segments)


def modulated(x: Tensor, shift: Tensor, scale: Tensor, segments: list) -> Tensor:
    for start, stop, row in segments:
        x[start:stop].mul_(1 + scale[row]).add_(shift[row])
    return x


def gated(x: Tensor, gate: Tensor, other: Tensor, segments: list) -> Tensor:
    for start, stop, row in segments:
        x[start:stop].addcmul_(other[start:stop], gate[row])
    return x


class Levels(nn.Module):
    def __init__(self, width: int, ops: Ops) -> None:
        super().__init__()
        self.width, self.proj_in, self.proj_out = width, ops.Linear(width, width), ops.Linear(width, width)

    def forward(self, t: Tensor) -> Tensor:
        return self.proj_out(F.silu(self.proj_in(waves(t, self.width))))


class PackedHead(nn.Module):
    def __init__(self, width: int, t_dim: int, video: int, audio: int, ops: Ops) -> None:
        super().__init__()
        self.norm, self.adaln_proj = ops.RMSNorm(width), Modulation(t_dim, width, 2, 1, ops)
        self.video_out, self.audio_out = ops.Linear(width, video), ops.Linear(width, audio)

    def forward(self, x: Tensor, t_emb: Tensor, video: tuple, audio: tuple) -> tuple[Tensor, Tensor]:
        shift, scale = self.adaln_proj(t_emb)
        parts = [self.norm(x[start:stop]) * (1 + scale[row]) + shift[row] for start, stop, row in (video, audio)]
        return self.video_out(parts[0]), self.audio_out(parts[1])


class MiniMaxH3Model(nn.Module):
    """Takes the latents of video (1, C, T, H, W) and sound (1, C', 2, T'). Text is as wide as the blocks, as the host prepares it."""

    def __init__(self, hidden_size=48, heads=2, num_layers=3, inner=96, latents_dim=8, audio_latents_dim=8, t_dim=16, gate_compress=False,
                 dtype=None, device=None, operations=None, **_more: Any) -> None:  # fmt: skip
        super().__init__()
        ops = Ops(operations, dtype, device)
        self.dtype, self.hidden_size, self.patch_size, self.heads = dtype, hidden_size, (1, 2, 2), heads
        self.latents_dim, self.audio_latents_dim = latents_dim, audio_latents_dim
        self.video_patch_proj, self.audio_patch_proj = ops.Linear(4 * latents_dim, hidden_size), ops.Linear(audio_latents_dim, hidden_size)
        self.condition_proj = ops.Linear(24, hidden_size)
        self.time_embedder, self.rope, self.token_refiner = Levels(t_dim, ops), nn.Module(), nn.Module()
        self.rope.register_buffer("inv_freq", torch.ones(1))
        self.token_refiner.blocks = nn.ModuleList([nn.Identity()])
        self.blocks = nn.ModuleList([PackedBlock(hidden_size, heads, inner, t_dim, gate_compress, ops) for _ in range(num_layers)])
        self.final_layer = PackedHead(hidden_size, t_dim, 4 * latents_dim, audio_latents_dim, ops)

    def forward(self, x: list, timestep: Tensor, context: Tensor, transformer_options: Any = {}, minimax_payload: Any = None,  # noqa: B006
                denoise_mask: Any = None, audio_denoise_mask: Any = None, **kwargs: Any) -> list:  # fmt: skip
        assert x[0].shape[0] == 1, "one row at a time"
        out = [torch.empty_like(latent) for latent in x]
        made = self._forward(x[0], x[1], timestep, context, transformer_options, minimax_payload["cond_video_latents"])
        for latent, part in zip(out, made):
            latent.copy_(part)
        return out

    def _forward(self, video: Tensor, audio: Tensor, timestep: Tensor, context: Tensor, transformer_options: Any, given: list) -> tuple:
        sigma = float(timestep[0] / 1000)
        levels = sorted({1 - sigma, 1 - sigma / (4 - 3 * sigma), *((0.999,) if given else ())})
        t_emb = self.time_embedder(torch.tensor(levels)).to(context.dtype)
        shape = (video.shape[2], video.shape[3] // 2, 2, video.shape[4] // 2, 2)
        still = torch.cat([torch.zeros(0, self.video_patch_proj.in_features), *map(self.patches, given)])
        embedded = self.video_patch_proj(torch.cat((still, self.patches(video))))
        sound = self.audio_patch_proj(audio[0].permute(1, 2, 0).flatten(0, 1))
        parts = [(context[0], 1 - sigma, 1), (embedded[: len(still)], 0.999, 0), (sound, 1 - sigma / (4 - 3 * sigma), 2),
                 (embedded[len(still) :], 1 - sigma, 0)]  # fmt: skip
        segments, at = [], 0
        for tokens, level, kind in parts:
            if len(tokens):
                segments.append((at, at + len(tokens), levels.index(level) * 3 + kind))
                at += len(tokens)
        h = torch.cat([tokens for tokens, _, _ in parts])
        freqs = angles(torch.arange(at)[None], self.hidden_size // self.heads)
        for block in self.blocks:
            h = block(h, t_emb, segments, freqs, transformer_options=transformer_options)
        (a, b, sound_row), (_, c, video_row) = segments[-2:]
        v, s = self.final_layer(h, t_emb, (b, c, video_row // 3), (a, b, sound_row // 3))
        v = v.unflatten(0, (shape[0], shape[1], shape[3])).unflatten(-1, (-1, 2, 2)).permute(3, 0, 1, 4, 2, 5).reshape(video.shape)
        return -v, -s.unflatten(0, (2, -1)).permute(2, 0, 1)[None]

    @staticmethod
    def patches(video: Tensor) -> Tensor:
        return video[0].unfold(2, 2, 2).unfold(3, 2, 2).permute(1, 2, 3, 0, 4, 5).flatten(3).flatten(0, 2)


class MiniMaxH3(StandIn):
    """Takes packed latents, (1, 1, numbers). `still`, beside the prompt, is a given picture (1, 8, 1, H, W)."""

    network = MiniMaxH3Model
    shapes = ((1, 8, 2, 4, 6), (1, 8, 2, 5))

    def extra_conds(self, **kwargs: Any) -> dict:
        out = super().extra_conds(**kwargs)
        out["latent_shapes"] = comfy.conds.CONDConstant(list(self.shapes))
        given = [kwargs["still"]] if kwargs.get("still") is not None else []
        payload = {"layout": object(), "cond_video_latents": given}  # unlike any other, so each call has one cond
        out["minimax_payload"] = comfy.conds.CONDConstant(payload)
        return out

"""A stand-in for ACE-Step 1.5, which only hosts newer than 0.3.75 have.

Written for these tests after the structure of comfy/ldm/ace/ace_step15.py in ComfyUI's public source: names of submodules, parameters of
forwards, order of sublayers, what is called by position and what by name. Audio codes are rows of a table, positions plain sums.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from stand_in_kandinsky_cogvideox_anima import attend, split, waves
from torch import Tensor, nn


class MLP(nn.Module):
    def __init__(self, width: int, ops: Any) -> None:
        super().__init__()
        self.gate_proj, self.up_proj = (ops.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down_proj = ops.Linear(2 * width, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class AceStepAttention(nn.Module):
    """Has fewer heads for keys and values than for queries, together wider than the stream. `window`: how far a frame sees (None: all)."""

    def __init__(self, width: int, ops: Any, window: int | None = None) -> None:
        super().__init__()
        self.num_heads, self.num_kv_heads, self.head_dim, self.window = 4, 2, 8, window
        self.q_proj, self.o_proj = ops.Linear(width, 32, bias=False), ops.Linear(32, width, bias=False)
        self.k_proj, self.v_proj = ops.Linear(width, 16, bias=False), ops.Linear(width, 16, bias=False)
        self.q_norm, self.k_norm = ops.RMSNorm(8), ops.RMSNorm(8)

    def forward(self, hidden_states, encoder_hidden_states=None, attention_mask=None, position_embeddings=None):
        seen = hidden_states if encoder_hidden_states is None else encoder_hidden_states
        q, k, v = self.q_norm(split(self.q_proj(hidden_states), 4)), self.k_norm(split(self.k_proj(seen), 2)), split(self.v_proj(seen), 2)
        if position_embeddings is not None and encoder_hidden_states is None:
            q, k = q + position_embeddings[0], k + position_embeddings[0]
        mask, places = None, torch.arange(hidden_states.shape[1])
        if self.window is not None:
            mask = (places[:, None] - places).abs() <= self.window
        return self.o_proj(attend(q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1), mask))


class AceStepDiTLayer(nn.Module):
    def __init__(self, width: int, window: int | None, ops: Any) -> None:
        super().__init__()
        self.self_attn_norm, self.cross_attn_norm, self.mlp_norm = (ops.RMSNorm(width) for _ in range(3))
        self.self_attn, self.cross_attn, self.mlp = AceStepAttention(width, ops, window), AceStepAttention(width, ops), MLP(width, ops)
        self.scale_shift_table = nn.Parameter(torch.empty(1, 6, width))

    def forward(self, hidden_states, temb, encoder_hidden_states, position_embeddings, attention_mask=None, encoder_attention_mask=None):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = (self.scale_shift_table + temb).chunk(6, dim=1)
        normed = self.self_attn_norm(hidden_states) * (1 + scale) + shift
        x = hidden_states + gate * self.self_attn(normed, position_embeddings=position_embeddings, attention_mask=attention_mask)
        x = x + self.cross_attn(self.cross_attn_norm(x), encoder_hidden_states=encoder_hidden_states, attention_mask=encoder_attention_mask)
        return x + gate_mlp * self.mlp(self.mlp_norm(x) * (1 + scale_mlp) + shift_mlp)


class AceStepEncoderLayer(nn.Module):
    def __init__(self, width: int, ops: Any) -> None:
        super().__init__()
        self.self_attn, self.mlp = AceStepAttention(width, ops), MLP(width, ops)
        self.input_layernorm, self.post_attention_layernorm = ops.RMSNorm(width), ops.RMSNorm(width)

    def forward(self, hidden_states, position_embeddings, attention_mask=None):
        x = hidden_states + self.self_attn(hidden_states=self.input_layernorm(hidden_states), position_embeddings=position_embeddings)
        return x + self.mlp(self.post_attention_layernorm(x))


class Encoder(nn.Module):
    """Encodes lyrics, or timbre, which is one token for a whole reference."""

    def __init__(self, given: int, width: int, ops: Any) -> None:
        super().__init__()
        self.embed_tokens, self.norm = ops.Linear(given, width), ops.RMSNorm(width)
        self.layers = nn.ModuleList([AceStepEncoderLayer(width, ops)])

    def forward(self, inputs_embeds: Tensor) -> Tensor:
        x = self.embed_tokens(inputs_embeds)
        for layer in self.layers:
            x = layer(x, position_embeddings=positions(x), attention_mask=None)
        return self.norm(x)


class AceStepConditionEncoder(nn.Module):
    def __init__(self, text: int, audio: int, width: int, ops: Any) -> None:
        super().__init__()
        self.text_projector = ops.Linear(text, width, bias=False)
        self.lyric_encoder, self.timbre_encoder = Encoder(text, width, ops), Encoder(audio, width, ops)

    def forward(
        self, text_hidden_states=None, text_attention_mask=None, lyric_hidden_states=None, lyric_attention_mask=None,
        refer_audio_acoustic_hidden_states_packed=None, refer_audio_order_mask=None,
    ):  # fmt: skip
        text = self.text_projector(text_hidden_states)
        lyrics = self.lyric_encoder(inputs_embeds=lyric_hidden_states)
        timbre = self.timbre_encoder(refer_audio_acoustic_hidden_states_packed)[:, :1]
        return torch.cat((lyrics, timbre, text), 1), None


class TimestepEmbedding(nn.Module):
    def __init__(self, width: int, ops: Any) -> None:
        super().__init__()
        self.linear_1, self.linear_2, self.time_proj = ops.Linear(16, width), ops.Linear(width, width), ops.Linear(width, 6 * width)

    def forward(self, t: Tensor, dtype: Any = None) -> tuple[Tensor, Tensor]:
        temb = self.linear_2(F.silu(self.linear_1(waves(t, 16).to(dtype))))
        return temb, self.time_proj(F.silu(temb)).unflatten(-1, (6, -1))


class AceStepDiTModel(nn.Module):
    def __init__(self, audio: int, width: int, depth: int, patch: int, ops: Any) -> None:
        super().__init__()
        self.patch_size = patch
        self.proj_in = nn.Sequential(nn.Identity(), ops.Conv1d(3 * audio, width, patch, patch))
        self.time_embed, self.time_embed_r = TimestepEmbedding(width, ops), TimestepEmbedding(width, ops)
        self.condition_embedder, self.norm_out = ops.Linear(width, width), ops.RMSNorm(width)
        self.layers = nn.ModuleList(AceStepDiTLayer(width, None if i % 2 else 5, ops) for i in range(depth))
        self.proj_out = nn.Sequential(nn.Identity(), nn.ConvTranspose1d(width, audio, patch, patch))
        self.scale_shift_table = nn.Parameter(torch.empty(1, 2, width))

    def forward(self, hidden_states, timestep, timestep_r, attention_mask, encoder_hidden_states, encoder_attention_mask, context_latents):
        (temb, proj), (temb_r, proj_r) = (
            embed(t, dtype=hidden_states.dtype) for embed, t in ((self.time_embed, timestep), (self.time_embed_r, timestep - timestep_r))
        )
        x = torch.cat((context_latents, hidden_states), -1)
        frames = x.shape[1]
        x = self.proj_in(F.pad(x, (0, 0, 0, -frames % self.patch_size)).transpose(1, 2)).transpose(1, 2)
        seen = self.condition_embedder(encoder_hidden_states)
        for layer in self.layers:
            x = layer(
                hidden_states=x, temb=proj + proj_r, encoder_hidden_states=seen, position_embeddings=positions(x), attention_mask=None,
                encoder_attention_mask=None,
            )  # fmt: skip
        shift, scale = (self.scale_shift_table + (temb + temb_r)[:, None]).chunk(2, dim=1)
        x = self.norm_out(x.contiguous()) * (1 + scale) + shift  # in the memory order of x, sums would round differently
        return self.proj_out(x.transpose(1, 2)).transpose(1, 2)[:, :frames]


class Tokenizer(nn.Module):
    """Makes a row for every five frames of a reference, and holds the table of codes."""

    def __init__(self, audio: int, width: int, ops: Any) -> None:
        super().__init__()
        self.audio_acoustic_proj, self.codes = ops.Linear(audio, width), nn.Parameter(torch.empty(16, width))

    def tokenize(self, x: Tensor) -> Tensor:
        return self.audio_acoustic_proj(F.pad(x, (0, 0, 0, -x.shape[1] % 5)).unflatten(1, (-1, 5))).mean(2)


class AudioTokenDetokenizer(nn.Module):
    def __init__(self, audio: int, width: int, ops: Any) -> None:
        super().__init__()
        self.embed_tokens, self.proj_out, self.norm = ops.Linear(width, width), ops.Linear(width, audio), ops.RMSNorm(width)
        self.special_tokens = nn.Parameter(torch.empty(1, 5, width))
        self.layers = nn.ModuleList([AceStepEncoderLayer(width, ops)])

    def forward(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        x = (self.embed_tokens(x)[:, :, None] + self.special_tokens).flatten(0, 1)
        for layer in self.layers:
            x = layer(x, positions(x))
        return self.proj_out(self.norm(x)).unflatten(0, (rows, -1)).flatten(1, 2)


class AceStepConditionGenerationModel(nn.Module):
    def __init__(self, audio, text, hidden_size, depth, patch_size=2, dtype=None, operations=None, **_more: Any) -> None:
        super().__init__()
        ops, self.dtype, self.pool_window_size = operations, dtype, 5
        self.decoder = AceStepDiTModel(audio, hidden_size, depth, patch_size, ops)
        self.encoder = AceStepConditionEncoder(text, audio, hidden_size, ops)
        self.tokenizer, self.detokenizer = Tokenizer(audio, hidden_size, ops), AudioTokenDetokenizer(audio, hidden_size, ops)
        self.null_condition_emb = nn.Parameter(torch.empty(1, 1, hidden_size))

    def forward(self, x, timestep, context, lyric_embed=None, refer_audio=None, audio_codes=None, replace_with_null_embeds=False, **_more):
        x, reference = x.movedim(-1, -2), refer_audio.movedim(-1, -2)
        seen, mask = self.encoder(context, None, lyric_embed, None, reference, torch.zeros(x.shape[0], dtype=torch.long))
        hints = self.tokenizer.tokenize(reference) if audio_codes is None else self.tokenizer.codes[audio_codes]
        hints = self.detokenizer(hints)[:, : x.shape[1]]
        if replace_with_null_embeds:
            seen[:] = self.null_condition_emb.to(seen)
        out = self.decoder(
            hidden_states=x, timestep=timestep, timestep_r=timestep, attention_mask=None, encoder_hidden_states=seen,
            encoder_attention_mask=mask, context_latents=torch.cat((hints, torch.ones_like(x)), -1),
        )  # fmt: skip
        return out.movedim(-1, -2)


def positions(x: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a pair, as the host's cosines and sines are. The second is not used."""
    place = waves(torch.arange(x.shape[1]), 8).to(x)
    return place, place

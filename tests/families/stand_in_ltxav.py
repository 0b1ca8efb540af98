"""A stand-in for LTX-2, which only hosts newer than 0.3.75 have, and how its pair of latents is sampled.

Written for these tests after the structure of comfy/ldm/lightricks/av_model.py and of LTXAV in comfy/model_base.py in ComfyUI's public
source: names of submodules, parameters of forwards, the eight sublayers of a block in their order, what is written in place, lists of two
latents at both ends. Positions are left out, attention is torch's own, timesteps are one a call.
"""

from __future__ import annotations

from typing import Any

import comfy.conds
import torch
import torch.nn.functional as F  # noqa: N812
from stand_in_kandinsky_cogvideox_anima import StandIn, attend, split, waves
from torch import Tensor, nn


def normed(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:])


class CrossAttention(nn.Module):
    def __init__(self, asking: int, seen: int, width: int, ops: Any) -> None:
        super().__init__()
        self.to_q, self.to_k, self.to_v = ops.Linear(asking, width), ops.Linear(seen, width), ops.Linear(seen, width)
        self.to_gate_logits, self.to_out = ops.Linear(asking, 2), nn.Sequential(ops.Linear(width, asking), nn.Dropout(0.0))

    def forward(self, x, context=None, mask=None, pe=None, k_pe=None, transformer_options={}):  # noqa: B006
        seen = x if context is None else context
        heads = attend(split(self.to_q(x), 2), split(self.to_k(seen), 2), split(self.to_v(seen), 2)).unflatten(-1, (2, -1))
        return self.to_out((heads * 2 * torch.sigmoid(self.to_gate_logits(x))[..., None]).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, width: int, ops: Any) -> None:
        super().__init__()
        self.net = nn.Sequential(ops.Linear(width, 4 * width), nn.GELU(), ops.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class BasicAVTransformerBlock(nn.Module):
    def __init__(self, video: int, audio: int, ops: Any) -> None:
        super().__init__()
        self.attn1, self.audio_attn1 = CrossAttention(video, video, video, ops), CrossAttention(audio, audio, audio, ops)
        self.attn2, self.audio_attn2 = CrossAttention(video, video, video, ops), CrossAttention(audio, audio, audio, ops)
        self.audio_to_video_attn = CrossAttention(video, audio, audio, ops)
        self.video_to_audio_attn = CrossAttention(audio, video, audio, ops)
        self.ff, self.audio_ff = FeedForward(video, ops), FeedForward(audio, ops)
        self.scale_shift_table, self.audio_scale_shift_table = nn.Parameter(torch.empty(6, video)), nn.Parameter(torch.empty(6, audio))

    def forward(
        self, x, v_context=None, a_context=None, attention_mask=None, v_timestep=None, a_timestep=None, v_pe=None, a_pe=None,
        v_cross_pe=None, a_cross_pe=None, v_cross_scale_shift_timestep=None, a_cross_scale_shift_timestep=None,
        v_cross_gate_timestep=None, a_cross_gate_timestep=None, transformer_options=None, self_attention_mask=None,
        v_prompt_timestep=None, a_prompt_timestep=None,
    ):  # fmt: skip
        vx, ax = x
        shift, scale, gate, v_shift, v_scale, v_gate = (self.scale_shift_table + v_timestep.unflatten(-1, (6, -1))).unbind(2)
        vx.addcmul_(self.attn1(normed(vx) * (1 + scale) + shift), gate)
        vx.add_(self.attn2(normed(vx), context=v_context, mask=attention_mask))
        shift, scale, gate, a_shift, a_scale, a_gate = (self.audio_scale_shift_table + a_timestep.unflatten(-1, (6, -1))).unbind(2)
        ax.addcmul_(self.audio_attn1(normed(ax) * (1 + scale) + shift), gate)
        ax.add_(self.audio_attn2(normed(ax), context=a_context, mask=attention_mask))
        heard = normed(ax)
        vx.addcmul_(self.audio_to_video_attn(normed(vx), context=heard), torch.tanh(v_cross_gate_timestep))
        ax.addcmul_(self.video_to_audio_attn(heard, context=normed(vx)), torch.tanh(a_cross_gate_timestep))
        vx.addcmul_(self.ff(normed(vx) * (1 + v_scale) + v_shift), v_gate)
        ax.addcmul_(self.audio_ff(normed(ax) * (1 + a_scale) + a_shift), a_gate)
        return vx, ax


class AdaLayerNormSingle(nn.Module):
    def __init__(self, width: int, numbers: int, ops: Any) -> None:
        super().__init__()
        self.width, self.emb, self.linear = width, ops.Linear(width, width), ops.Linear(width, numbers * width)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        embedded = self.emb(waves(timestep, self.width).to(dtype))[:, None]
        return self.linear(F.silu(embedded)), embedded


class AudioPatchifier:
    def patchify(self, x: Tensor) -> Tensor:
        return x.transpose(1, 2).flatten(2)

    def unpatchify(self, tokens: Tensor, channels: int) -> Tensor:
        return tokens.unflatten(2, (channels, -1)).transpose(1, 2)


class LTXVModel(nn.Module):
    """The base class of LTX-2's model."""


class LTXAVModel(LTXVModel):
    def __init__(self, inner_dim, audio_inner_dim, in_channels, text, depth, dtype=None, operations=None, **_more: Any) -> None:
        super().__init__()
        ops, self.dtype, self.in_channels, self.num_audio_channels = operations, dtype, in_channels, 2
        self.inner_dim, self.audio_inner_dim, self.caption_channels = inner_dim, audio_inner_dim, text
        self.patchify_proj, self.audio_patchify_proj = ops.Linear(in_channels, inner_dim), ops.Linear(in_channels, audio_inner_dim)
        self.caption_projection, self.audio_caption_projection = ops.Linear(text, inner_dim), ops.Linear(text, audio_inner_dim)
        self.adaln_single, self.audio_adaln_single = AdaLayerNormSingle(inner_dim, 6, ops), AdaLayerNormSingle(audio_inner_dim, 6, ops)
        self.av_ca_a2v_gate_adaln_single = AdaLayerNormSingle(inner_dim, 1, ops)
        self.av_ca_v2a_gate_adaln_single = AdaLayerNormSingle(audio_inner_dim, 1, ops)
        self.transformer_blocks = nn.ModuleList(BasicAVTransformerBlock(inner_dim, audio_inner_dim, ops) for _ in range(depth))
        self.scale_shift_table, self.audio_scale_shift_table = (nn.Parameter(torch.empty(2, w)) for w in (inner_dim, audio_inner_dim))
        self.norm_out, self.audio_norm_out = (ops.LayerNorm(w, elementwise_affine=False) for w in (inner_dim, audio_inner_dim))
        self.proj_out, self.audio_proj_out = ops.Linear(inner_dim, in_channels), ops.Linear(audio_inner_dim, in_channels)
        self.a_patchifier = AudioPatchifier()

    def forward(
        self, x, timestep, context, attention_mask=None, frame_rate=25, transformer_options={}, keyframe_idxs=None, **kwargs  # noqa: B006
    ):  # fmt: skip
        video, *sound = x if isinstance(x, list) else (x,)  # newer hosts pass a list of one
        audio = sound[0] if sound else video.new_zeros(video.shape[0], self.num_audio_channels, 0, 8)
        v_time, a_time = timestep
        vx = self.patchify_proj(video.flatten(2).transpose(1, 2))
        ax = self.audio_patchify_proj(self.a_patchifier.patchify(audio))
        (v_timestep, v_embedded), (a_timestep, a_embedded) = self.adaln_single(v_time, vx.dtype), self.audio_adaln_single(a_time, vx.dtype)
        v_context, a_context = context.split([self.caption_channels, self.caption_channels], -1)
        v_context, a_context = self.caption_projection(v_context), self.audio_caption_projection(a_context)
        for block in self.transformer_blocks:
            vx, ax = block(
                (vx, ax), v_context=v_context, a_context=a_context, attention_mask=attention_mask, v_timestep=v_timestep,
                a_timestep=a_timestep, v_pe=None, a_pe=None, v_cross_pe=None, a_cross_pe=None, v_cross_scale_shift_timestep=None,
                a_cross_scale_shift_timestep=None, v_cross_gate_timestep=self.av_ca_a2v_gate_adaln_single(a_time, vx.dtype)[0],
                a_cross_gate_timestep=self.av_ca_v2a_gate_adaln_single(v_time, vx.dtype)[0], transformer_options=transformer_options,
                self_attention_mask=None, v_prompt_timestep=None, a_prompt_timestep=None,
            )  # fmt: skip
        shift, scale = (self.scale_shift_table + v_embedded).chunk(2, 1)
        video = self.proj_out(self.norm_out(vx) * (1 + scale) + shift).transpose(1, 2).reshape(video.shape)
        shift, scale = (self.audio_scale_shift_table + a_embedded).chunk(2, 1)
        audio = self.a_patchifier.unpatchify(self.audio_proj_out(self.audio_norm_out(ax) * (1 + scale) + shift), self.num_audio_channels)
        return [video, audio] if audio.numel() else video


class LTXAV(StandIn):
    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        return super().extra_conds(**kwargs) | {"latent_shapes": comfy.conds.CONDConstant(kwargs["latent_shapes"])}

    def process_timestep(self, timestep: Tensor, **_kwargs: Any) -> tuple[Tensor, Tensor]:
        return timestep, timestep

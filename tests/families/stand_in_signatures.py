"""The host's LTX-Video, Qwen-Image, Lumina 2 and Z-Image with blocks that are called as in hosts newer than 0.3.75.

They are the host's own classes with another forward, written for these tests after the structure of comfy/ldm/lightricks/model.py,
qwen_image/model.py and lumina/model.py in ComfyUI's public source: the parameters of a block's forward, what is passed by position and what
by name, where reference pictures are and how they are modulated. Class names are the host's, as families look at them.
"""

from __future__ import annotations

from inspect import signature
from typing import Any

import comfy.conds
import comfy.ldm.lightricks.model as lightricks
import comfy.ldm.lumina.model as lumina
import comfy.ldm.qwen_image.model as qwen_image
import comfy.model_base
import torch
from comfy.ldm.lightricks.symmetric_patchifier import latent_to_pixel_coords
from torch import Tensor, nn


def as_newer(cls: type, **more: Any) -> Any:
    """Returns a function that makes a network an instance of `cls`, in place. `more`: attributes that its constructor would set."""

    def convert(network: Any) -> None:
        network.__class__ = cls
        for name, value in more.items():
            setattr(network, name, value)

    return convert


# -- LTX-Video ----------------------------------------------------------------------------------------


class BasicTransformerBlock(lightricks.BasicTransformerBlock):
    """Modulates the text and the queries about it as well, if `cross_attention_adaln` is set."""

    cross_attention_adaln = False

    def forward(
        self, x, context=None, attention_mask=None, timestep=None, pe=None, transformer_options={},  # noqa: B006
        self_attention_mask=None, prompt_timestep=None,
    ):  # fmt: skip
        numbers = self.scale_shift_table + timestep.reshape(x.shape[0], timestep.shape[1], self.scale_shift_table.shape[0], -1)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *asking = numbers.unbind(2)
        x += self.attn1(normed(x) * (1 + scale) + shift, pe=pe[0], mask=self_attention_mask) * gate
        if self.cross_attention_adaln:
            shift_kv, scale_kv = (self.prompt_scale_shift_table + prompt_timestep.unflatten(-1, (2, -1))).unbind(2)
            seen = context * (1 + scale_kv) + shift_kv
            x += self.attn2(normed(x) * (1 + asking[1]) + asking[0], context=seen, mask=attention_mask) * asking[2]
        else:
            x += self.attn2(x, context=context, mask=attention_mask)
        x.addcmul_(self.ff(normed(x) * (1 + scale_mlp) + shift_mlp), gate_mlp)
        return x


class ModulatedBlock(BasicTransformerBlock):
    cross_attention_adaln = True


class LTXVModel(lightricks.LTXVModel):
    def forward(self, x, timestep, context, attention_mask=None, **kwargs: Any) -> Tensor:
        return super().forward(x, timestep, context, attention_mask, **kwargs)

    def _forward(self, x, timestep, context, attention_mask, frame_rate=25, transformer_options={}, keyframe_idxs=None, **_kwargs: Any):  # noqa: B006
        shape = x.shape
        x, places = self.patchifier.patchify(x)
        places = latent_to_pixel_coords(latent_coords=places, scale_factors=self.vae_scale_factors, causal_fix=False).float()
        pe = (lightricks.precompute_freqs_cis(places, dim=self.inner_dim, out_dtype=x.dtype), False)
        x, nothing = self.patchify_proj(x), {"resolution": None, "aspect_ratio": None}
        vectors, embedded = self.adaln_single(timestep.flatten() * 1000, nothing, batch_size=shape[0], hidden_dtype=x.dtype)
        vectors, embedded, prompt = vectors.unflatten(0, (shape[0], -1)), embedded.unflatten(0, (shape[0], -1)), None
        if getattr(self, "prompt_adaln_single", None) is not None:
            prompt = self.prompt_adaln_single(timestep.flatten() * 1000, nothing, batch_size=shape[0], hidden_dtype=x.dtype)[0][:, None]
        if not self.caption_proj_before_connector:
            context = self.caption_projection(context)
        for block in self.transformer_blocks:
            x = block(
                x, context=context, attention_mask=None, timestep=vectors, pe=pe, transformer_options=transformer_options,
                self_attention_mask=None, prompt_timestep=prompt,
            )  # fmt: skip
        shift, scale = (self.scale_shift_table + embedded[:, :, None]).unbind(2)
        x = self.proj_out(self.norm_out(x) * (1 + scale) + shift)
        return self.patchifier.unpatchify(
            latents=x, output_height=shape[3], output_width=shape[4], output_num_frames=shape[2], out_channels=shape[1]
        )


class LTXVImageModel(LTXVModel):
    """Takes pictures only. Text comes projected; some checkpoints have no layer for that."""


def calls_ltxv_so() -> bool:
    """Returns whether the host itself calls LTX-Video's blocks in this way, so that its own class can be used."""
    return "prompt_timestep" in signature(lightricks.BasicTransformerBlock.forward).parameters


def normed(x: Tensor) -> Tensor:
    return lightricks.comfy.ldm.common_dit.rms_norm(x)


def newer_ltxv(network: Any, is_modulated: bool = False, is_image: bool = False) -> None:
    """Converts a network in place.

    Args:
        is_modulated: Whether blocks modulate the text (see BasicTransformerBlock).
        is_image: Whether it is the model of pictures, which gets text that needs no projection.
    """
    as_newer(LTXVImageModel if is_image else LTXVModel, caption_proj_before_connector=is_image)(network)
    if is_image:
        del network.caption_projection
        network.caption_projection = lambda text: text  # as the host has it
    for block in network.transformer_blocks:
        as_newer(ModulatedBlock if is_modulated else BasicTransformerBlock)(block)
        as_newer(FeedForward)(block.ff)
        for attention in (block.attn1, block.attn2):
            attention.__class__, attention.to_gate_logits = GatedAttention, nn.Linear(network.inner_dim, attention.heads)
        if is_modulated:
            width = network.inner_dim
            block.scale_shift_table = nn.Parameter(seeded(9, width))
            block.prompt_scale_shift_table = nn.Parameter(seeded(2, width))
    if is_modulated:
        network.adaln_single.linear = nn.Linear(network.inner_dim, 9 * network.inner_dim)
        network.prompt_adaln_single = lightricks.AdaLayerNormSingle(network.inner_dim, operations=nn)
        network.prompt_adaln_single.linear = nn.Linear(network.inner_dim, 2 * network.inner_dim)
    network.requires_grad_(False)


class FeedForward(lightricks.FeedForward):
    """Computes the activation and the second layer in one kernel, which takes that layer's weights and does not call it."""

    def forward(self, x: Tensor) -> Tensor:
        last = self.net[2]
        return nn.functional.linear(nn.functional.gelu(self.net[0].proj(x), approximate="tanh"), last.weight, last.bias)


class GatedAttention(lightricks.CrossAttention):
    """Has a gate for each head. The host applies it before the last layer; here it is after it, which does not matter to a cache."""

    def forward(self, x, context=None, mask=None, pe=None, k_pe=None, transformer_options={}):  # noqa: B006
        return super().forward(x, context, mask, pe) * torch.sigmoid(self.to_gate_logits(x)).mean(-1, keepdim=True)


def seeded(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(8)) / shape[-1] ** 0.5


# -- Qwen-Image ---------------------------------------------------------------------------------------


class QwenImageTransformerBlock(qwen_image.QwenImageTransformerBlock):
    def forward(
        self, hidden_states, encoder_hidden_states, encoder_hidden_states_mask, temb, image_rotary_emb=None, timestep_zero_index=None,
        transformer_options={},  # noqa: B006
    ):  # fmt: skip
        ends = slice(timestep_zero_index), slice(timestep_zero_index or hidden_states.shape[1], None)
        both = temb.chunk(2) if timestep_zero_index is not None else (temb, temb)
        img_mods, txt_mods = [self.img_mod(t)[:, None].chunk(6, -1) for t in both], self.txt_mod(both[0])[:, None].chunk(6, -1)

        def spread(number: int) -> Tensor:
            return torch.cat([mods[number].expand_as(hidden_states)[:, end] for mods, end in zip(img_mods, ends)], 1)

        img_in = self.img_norm1(hidden_states) * (1 + spread(1)) + spread(0)
        txt_in = self.txt_norm1(encoder_hidden_states) * (1 + txt_mods[1]) + txt_mods[0]
        img_out, txt_out = self.attn(
            hidden_states=img_in, encoder_hidden_states=txt_in, encoder_hidden_states_mask=encoder_hidden_states_mask,
            image_rotary_emb=image_rotary_emb, transformer_options=transformer_options,
        )  # fmt: skip
        img, txt = hidden_states + spread(2) * img_out, encoder_hidden_states + txt_mods[2] * txt_out
        img = img + spread(5) * self.img_mlp(self.img_norm2(img) * (1 + spread(4)) + spread(3))
        return txt + txt_mods[5] * self.txt_mlp(self.txt_norm2(txt) * (1 + txt_mods[4]) + txt_mods[3]), img


class QwenImageTransformer2DModel(qwen_image.QwenImageTransformer2DModel):
    """Modulates reference pictures as if they had no noise."""

    def forward(
        self,
        x,
        timestep,
        context,
        attention_mask=None,
        ref_latents=None,
        additional_t_cond=None,
        transformer_options={},  # noqa: B006
        **_kwargs,
    ):
        hidden, ids, shape = self.process_img(x)
        length, start = hidden.shape[1], None
        for index, reference in enumerate(ref_latents or (), start=1):
            more, more_ids, _ = self.process_img(reference, index=index)
            hidden, ids = torch.cat((hidden, more), 1), torch.cat((ids, more_ids), 1)
            start = length
        txt_ids = torch.arange(context.shape[1]).reshape(1, -1, 1).repeat(x.shape[0], 1, 3)
        rope = self.pe_embedder(torch.cat((txt_ids, ids), 1)).to(x.dtype).contiguous()
        img, txt = self.img_in(hidden), self.txt_in(self.txt_norm(context))
        temb = self.time_text_embed(timestep if start is None else torch.cat((timestep, timestep * 0)), img)
        for block in self.transformer_blocks:
            txt, img = block(
                hidden_states=img, encoder_hidden_states=txt, encoder_hidden_states_mask=attention_mask, temb=temb, image_rotary_emb=rope,
                timestep_zero_index=start, transformer_options=transformer_options,
            )  # fmt: skip
        img = self.proj_out(self.norm_out(img, temb if start is None else temb.chunk(2)[0]))[:, :length]
        grid = img.view(shape[0], shape[-2] // 2, shape[-1] // 2, shape[1], 2, 2).permute(0, 3, 1, 4, 2, 5)
        return grid.reshape(shape)[:, :, :, : x.shape[-2], : x.shape[-1]]


def newer_qwen_image(network: Any) -> None:
    as_newer(QwenImageTransformer2DModel)(network)
    for block in network.transformer_blocks:
        as_newer(QwenImageTransformerBlock)(block)


# -- Lumina 2, Z-Image --------------------------------------------------------------------------------


class JointTransformerBlock(lumina.JointTransformerBlock):
    def forward(
        self, x, x_mask, freqs_cis, adaln_input=None, timestep_zero_index=None, transformer_options={},  # noqa: B006
    ):  # fmt: skip
        """Modulates tokens in the ranges `timestep_zero_index` as noisy ones and all others as clean ones, whose vectors come first."""
        if timestep_zero_index is None:
            return super().forward(x, x_mask, freqs_cis, adaln_input, transformer_options=transformer_options)
        clean, noisy = (self.adaLN_modulation(rows)[:, None].expand(-1, x.shape[1], -1) for rows in adaln_input.chunk(2))
        is_noisy = torch.zeros(x.shape[1], 1, dtype=torch.bool)
        for start, end in timestep_zero_index:
            is_noisy[start:end] = True
        scale, gate, scale_mlp, gate_mlp = torch.where(is_noisy, noisy, clean).chunk(4, -1)
        x = x + gate.tanh() * self.attention_norm2(self.attention(self.attention_norm1(x) * (1 + scale), x_mask, freqs_cis))
        return x + gate_mlp.tanh() * self.ffn_norm2(self.feed_forward(self.ffn_norm1(x) * (1 + scale_mlp)))


class NextDiT(lumina.NextDiT):
    def _forward(
        self, x, timesteps, context, num_tokens, attention_mask=None, ref_latents=(), ref_frames=(), transformer_options={}, **_kwargs,  # noqa: B006
    ):  # fmt: skip
        """Puts `ref_latents` before the image, each filled up separately and modulated as clean; `ref_frames` after it, as its parts."""
        are_clean = len(ref_latents) > 0
        vectors = self.t_embedder(
            (1.0 - torch.cat((timesteps * 0, timesteps) if are_clean else (timesteps,))) * self.time_scale, dtype=x.dtype
        )
        txt = self.filled(self.cap_embedder(context), "cap_pad_token")
        image = self.filled(torch.cat([self.patches(picture) for picture in (x, *ref_frames)], 1), "x_pad_token")
        img = torch.cat([*(self.filled(self.patches(picture), "x_pad_token") for picture in ref_latents), image], 1)
        place = torch.arange(txt.shape[1] + img.shape[1])[None, :, None].expand(x.shape[0], -1, 3)
        rope = self.rope_embedder(place).movedim(1, 2)
        for layer in self.context_refiner:
            txt = layer(txt, None, rope[:, : txt.shape[1]], transformer_options=transformer_options)
        noisy = [(img.shape[1] - image.shape[1], img.shape[1])] if are_clean else None
        for layer in self.noise_refiner:
            img = layer(img, None, rope[:, txt.shape[1] :], vectors, timestep_zero_index=noisy, transformer_options=transformer_options)
        joint = torch.cat((txt, img), 1)
        start = joint.shape[1] - image.shape[1]
        noisy = [(start, joint.shape[1]), (0, txt.shape[1])] if are_clean else None
        for layer in self.layers:
            joint = layer(joint, None, rope, vectors, timestep_zero_index=noisy, transformer_options=transformer_options)
        out = self.final_layer(joint, vectors.chunk(2)[1] if are_clean else vectors)
        return -self.unpatchify(out, [x.shape[2:]] * x.shape[0], [start] * x.shape[0], return_tensor=True)

    def patches(self, picture: Tensor) -> Tensor:
        return self.x_embedder(picture.unflatten(3, (-1, 2)).unflatten(2, (-1, 2)).permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2))

    def filled(self, tokens: Tensor, name: str) -> Tensor:
        more = 0 if self.pad_tokens_multiple is None else -tokens.shape[1] % self.pad_tokens_multiple
        return torch.cat((tokens, getattr(self, name).expand(tokens.shape[0], more, -1)), 1) if more else tokens


class LuminaWithPictures(comfy.model_base.Lumina2):
    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        given = {name: kwargs[name] for name in ("ref_latents", "ref_frames") if name in kwargs}
        return super().extra_conds(**kwargs) | {name: comfy.conds.CONDList(pictures) for name, pictures in given.items()}


def newer_lumina(network: Any) -> None:
    as_newer(NextDiT)(network)
    for block in (*network.layers, *network.noise_refiner, *network.context_refiner):
        as_newer(JointTransformerBlock)(block)

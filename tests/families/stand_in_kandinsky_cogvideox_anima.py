"""Stand-ins for networks that only hosts newer than 0.3.75 have (Kandinsky 5, CogVideoX, Anima), and what lets the host sample them.

Written for these tests after the structure of comfy/ldm/kandinsky5/model.py, cogvideo/model.py, anima/model.py and cosmos/predict2.py in
ComfyUI's public source: names of submodules, parameters of forwards, order of sublayers, what is passed by position and what by name.
Positions are plain sums, attention is torch's own, and what only concerns a checkpoint is left out.
"""

from __future__ import annotations

from typing import Any

import comfy.conds
import comfy.latent_formats
import comfy.ldm.cosmos.predict2 as predict2
import comfy.model_base
import comfy.supported_models_base
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn


class StandIn(comfy.model_base.BaseModel):
    """A network as the host holds it. The config names its class, and which parts of the conditioning it gets as which arguments."""

    def __init__(self, config: Any, device: Any = None) -> None:
        super().__init__(config, comfy.model_base.ModelType.FLOW, device=device, unet_model=config.network)

    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        given = {name: kwargs[key] for key, name in self.model_config.conds.items() if kwargs.get(key) is not None}
        return super().extra_conds(**kwargs) | {name: comfy.conds.CONDRegular(value) for name, value in given.items()}


def config_of(network: type, channels: int, axes: int, host: type = StandIn, **conds: str) -> type:
    """Returns a config class for `making.tiny`.

    Args:
        network: Class of the network.
        channels: Of the latent.
        axes: Of the latent, besides its channels.
        host: Class of the host's model.
        conds: From a name in the conditioning to the name of an argument.
    """

    class Latent(comfy.latent_formats.LatentFormat):
        latent_channels = channels
        latent_dimensions = axes

    names = {"cross_attn": "c_crossattn", **conds}

    class Config(comfy.supported_models_base.BASE):
        unet_extra_config: dict[str, Any] = {}  # noqa: RUF012 (the host's own way)
        latent_format = Latent

        def get_model(self, state_dict: Any, prefix: str = "", device: Any = None) -> Any:
            self.network, self.conds = network, names
            return host(self, device=device).eval()

    return Config


def split(x: Tensor, heads: int) -> Tensor:
    """Splits (B, L, C) into (B, heads, L, C / heads)."""
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attends with q, k and v (B, heads, L, width). Returns (B, L, heads · width)."""
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)


def waves(numbers: Tensor, width: int) -> Tensor:
    """Returns cosines and sines (…, width) of numbers (…)."""
    rates = 100.0 ** -torch.linspace(0, 1, width // 2, device=numbers.device)
    phases = numbers.float()[..., None] * rates
    return torch.cat((phases.cos(), phases.sin()), -1)


# -- Kandinsky 5 --------------------------------------------------------------------------------------


class KandinskyTime(nn.Module):
    def __init__(self, width: int, time: int, ops: Any) -> None:
        super().__init__()
        self.width, self.in_layer, self.out_layer = width, ops.Linear(width, time), ops.Linear(time, time)

    def forward(self, timestep: Tensor, dtype: torch.dtype) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(waves(timestep, self.width).to(dtype))))


class KandinskyText(nn.Module):
    def __init__(self, given: int, width: int, ops: Any) -> None:
        super().__init__()
        self.in_layer, self.norm = ops.Linear(given, width), ops.LayerNorm(width)

    def forward(self, text_embed: Tensor) -> Tensor:
        return self.norm(self.in_layer(text_embed))


class KandinskyVisual(nn.Module):
    def __init__(self, given: int, width: int, ops: Any) -> None:
        super().__init__()
        self.in_layer = ops.Linear(given, width)

    def forward(self, x: Tensor) -> Tensor:
        patches = x.movedim(1, -1).unflatten(3, (-1, 2)).unflatten(2, (-1, 2))  # B T H 2 W 2 C
        return self.in_layer(patches.transpose(3, 4).flatten(4))


class KandinskyModulation(nn.Module):
    def __init__(self, time: int, width: int, numbers: int, ops: Any) -> None:
        super().__init__()
        self.out_layer = ops.Linear(time, numbers * width)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(x))


class KandinskyAttention(nn.Module):
    def __init__(self, width: int, heads: int, ops: Any) -> None:
        super().__init__()
        self.num_heads = heads
        self.to_query, self.to_key, self.to_value = (ops.Linear(width, width) for _ in range(3))
        self.query_norm, self.key_norm = ops.RMSNorm(width // heads), ops.RMSNorm(width // heads)
        self.out_layer = ops.Linear(width, width)

    def forward(self, x: Tensor, context: Tensor | None = None, freqs: Tensor | None = None) -> Tensor:
        seen = x if context is None else context
        q, k, v = (split(layer(on), self.num_heads) for layer, on in ((self.to_query, x), (self.to_key, seen), (self.to_value, seen)))
        q, k = self.query_norm(q), self.key_norm(k)
        return self.out_layer(attend(q, k, v) if freqs is None else attend(q + freqs, k + freqs, v))


class KandinskyFeedForward(nn.Module):
    def __init__(self, width: int, inner: int, ops: Any) -> None:
        super().__init__()
        self.in_layer, self.out_layer = ops.Linear(width, inner, bias=False), ops.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.gelu(self.in_layer(x)))


def gated_sum(x: Tensor, vectors: Tensor, norm: nn.Module, sublayer: Any) -> Tensor:
    shift, scale, gate = vectors[:, None].chunk(3, -1)
    return torch.addcmul(x, gate, sublayer(torch.addcmul(shift, norm(x), scale + 1.0)))


class TransformerEncoderBlock(nn.Module):
    def __init__(self, width: int, time: int, inner: int, heads: int, ops: Any) -> None:
        super().__init__()
        self.text_modulation = KandinskyModulation(time, width, 6, ops)
        self.self_attention_norm, self.feed_forward_norm = (ops.LayerNorm(width, elementwise_affine=False) for _ in range(2))
        self.self_attention, self.feed_forward = KandinskyAttention(width, heads, ops), KandinskyFeedForward(width, inner, ops)

    def forward(self, x, time_embed, freqs, transformer_options={}):  # noqa: B006
        of_attention, of_rest = self.text_modulation(time_embed).chunk(2, -1)
        x = gated_sum(x, of_attention, self.self_attention_norm, lambda y: self.self_attention(y, freqs=freqs))
        return gated_sum(x, of_rest, self.feed_forward_norm, self.feed_forward)


class TransformerDecoderBlock(nn.Module):
    def __init__(self, width: int, time: int, inner: int, heads: int, ops: Any) -> None:
        super().__init__()
        self.visual_modulation = KandinskyModulation(time, width, 9, ops)
        norms = (ops.LayerNorm(width, elementwise_affine=False) for _ in range(3))
        self.self_attention_norm, self.cross_attention_norm, self.feed_forward_norm = norms
        self.self_attention, self.cross_attention = (KandinskyAttention(width, heads, ops) for _ in range(2))
        self.feed_forward = KandinskyFeedForward(width, inner, ops)

    def forward(self, visual_embed, text_embed, time_embed, freqs, transformer_options={}):  # noqa: B006
        of_self, of_cross, of_rest = self.visual_modulation(time_embed).chunk(3, -1)
        x = gated_sum(visual_embed, of_self, self.self_attention_norm, lambda y: self.self_attention(y, freqs=freqs))
        x = gated_sum(x, of_cross, self.cross_attention_norm, lambda y: self.cross_attention(y, text_embed))
        return gated_sum(x, of_rest, self.feed_forward_norm, self.feed_forward)


class KandinskyOut(nn.Module):
    def __init__(self, width: int, time: int, outputs: int, ops: Any) -> None:
        super().__init__()
        self.modulation = KandinskyModulation(time, width, 2, ops)
        self.norm, self.out_layer = ops.LayerNorm(width, elementwise_affine=False), ops.Linear(width, 4 * outputs)

    def forward(self, visual_embed: Tensor, time_embed: Tensor) -> Tensor:
        shift, scale = self.modulation(time_embed)[:, None, None, None].chunk(2, -1)
        x = self.out_layer(self.norm(visual_embed) * (1 + scale) + shift).unflatten(-1, (-1, 2, 2))  # B T H W C 2 2
        return x.permute(0, 4, 1, 2, 5, 3, 6).flatten(5, 6).flatten(3, 4)


class Kandinsky5(nn.Module):
    def __init__(
        self, model_dim, time_dim, ff_dim, channels, text, pooled, heads, depth, dtype=None, operations=None, **_more: Any
    ) -> None:
        super().__init__()
        ops, self.dtype, self.model_dim, self.heads = operations, dtype, model_dim, heads
        self.time_embeddings = KandinskyTime(model_dim, time_dim, ops)
        self.text_embeddings, self.pooled_text_embeddings = KandinskyText(text, model_dim, ops), KandinskyText(pooled, time_dim, ops)
        self.visual_embeddings = KandinskyVisual(4 * channels, model_dim, ops)
        sizes = (model_dim, time_dim, ff_dim, heads, ops)
        self.text_transformer_blocks = nn.ModuleList(TransformerEncoderBlock(*sizes) for _ in range(2))
        self.visual_transformer_blocks = nn.ModuleList(TransformerDecoderBlock(*sizes) for _ in range(depth))
        self.out_layer = KandinskyOut(model_dim, time_dim, channels, ops)

    def forward(self, x, timestep, context, y, time_dim_replace=None, transformer_options={}, **_more: Any) -> Tensor:  # noqa: B006
        time = self.time_embeddings(timestep, x.dtype) + self.pooled_text_embeddings(y)
        context = self.text_embeddings(context)
        for block in self.text_transformer_blocks:
            context = block(context, time, self.positions(context), transformer_options=transformer_options)
        visual = self.visual_embeddings(x)
        grid, visual = visual.shape[:-1], visual.flatten(1, -2)
        freqs = self.positions(visual)
        for block in self.visual_transformer_blocks:
            visual = block(visual, context, time, freqs=freqs, transformer_options=transformer_options)
        return self.out_layer(visual.reshape(*grid, -1), time)

    def positions(self, tokens: Tensor) -> Tensor:
        return waves(torch.arange(tokens.shape[1]), self.model_dim // self.heads).to(tokens)


# -- CogVideoX ----------------------------------------------------------------------------------------


class CogPatches(nn.Module):
    def __init__(self, channels: int, width: int, text: int, depth: int | None, ops: Any) -> None:
        super().__init__()
        self.patch_size_t = depth
        self.proj = ops.Conv2d(channels, width, 2, 2) if depth is None else ops.Linear(channels * 4 * depth, width)
        self.text_proj = ops.Linear(text, width)

    def forward(self, text_embeds: Tensor, image_embeds: Tensor) -> Tensor:
        """Puts text (B, L, d) and video (B, T, C, H, W) into one sequence."""
        rows, depth = image_embeds.shape[0], self.patch_size_t
        if depth is None:
            video = self.proj(image_embeds.flatten(0, 1)).flatten(2).transpose(1, 2).unflatten(0, (rows, -1)).flatten(1, 2)
        else:
            cut = image_embeds.unflatten(4, (-1, 2)).unflatten(3, (-1, 2)).unflatten(1, (-1, depth))  # B T t C H 2 W 2
            video = self.proj(cut.permute(0, 1, 4, 6, 3, 2, 5, 7).flatten(4).flatten(1, 3))
        places = waves(torch.arange(video.shape[1]), video.shape[2]).to(video)
        return torch.cat((self.text_proj(text_embeds), video + 0.3 * places), 1)


class CogVideoXLayerNormZero(nn.Module):
    def __init__(self, time: int, width: int, ops: Any) -> None:
        super().__init__()
        self.linear, self.norm = ops.Linear(time, 6 * width), ops.LayerNorm(width)

    def forward(self, hidden_states: Tensor, encoder_hidden_states: Tensor, temb: Tensor) -> tuple[Tensor, ...]:
        shift, scale, gate, shift_txt, scale_txt, gate_txt = self.linear(F.silu(temb))[:, None].chunk(6, -1)
        img, txt = self.norm(hidden_states) * (1 + scale) + shift, self.norm(encoder_hidden_states) * (1 + scale_txt) + shift_txt
        return img, txt, gate, gate_txt


class CogVideoXBlock(nn.Module):
    def __init__(self, width: int, heads: int, time: int, ops: Any) -> None:
        super().__init__()
        self.num_heads = heads
        self.norm1, self.norm2 = CogVideoXLayerNormZero(time, width, ops), CogVideoXLayerNormZero(time, width, ops)
        self.q, self.k, self.v, self.attn_out = (ops.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = ops.LayerNorm(width // heads), ops.LayerNorm(width // heads)
        self.ff_proj, self.ff_out = ops.Linear(width, 4 * width), ops.Linear(4 * width, width)

    def forward(self, hidden_states, encoder_hidden_states, temb, image_rotary_emb=None, transformer_options={}):  # noqa: B006
        length = encoder_hidden_states.shape[1]
        img, txt, gate, gate_txt = self.norm1(hidden_states, encoder_hidden_states, temb)
        joint = torch.cat((txt, img), 1)
        q, k, v = (split(layer(joint), self.num_heads) for layer in (self.q, self.k, self.v))
        result = self.attn_out(attend(self.norm_q(q), self.norm_k(k), v))
        img, txt = hidden_states + gate * result[:, length:], encoder_hidden_states + gate_txt * result[:, :length]
        img_in, txt_in, gate, gate_txt = self.norm2(img, txt, temb)
        result = self.ff_out(F.gelu(self.ff_proj(torch.cat((txt_in, img_in), 1)), approximate="tanh"))
        return img + gate * result[:, length:], txt + gate_txt * result[:, :length]


class CogVideoXAdaLayerNorm(nn.Module):
    def __init__(self, time: int, width: int, ops: Any) -> None:
        super().__init__()
        self.linear, self.norm = ops.Linear(time, 2 * width), ops.LayerNorm(width)

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        shift, scale = self.linear(F.silu(temb))[:, None].chunk(2, -1)
        return self.norm(x) * (1 + scale) + shift


class CogVideoXTransformer3DModel(nn.Module):
    def __init__(self, dim, heads, channels, time, text, depth, patch_size_t=None, dtype=None, operations=None, **_more: Any) -> None:
        super().__init__()
        ops, self.dtype, self.dim, self.patch_size, self.patch_size_t = operations, dtype, dim, 2, patch_size_t
        self.patch_embed = CogPatches(channels, dim, text, patch_size_t, ops)
        self.time_embedding_linear_1, self.time_embedding_linear_2 = ops.Linear(dim, time), ops.Linear(time, time)
        self.ofs_embedding_linear_1 = None
        self.blocks = nn.ModuleList(CogVideoXBlock(dim, heads, time, ops) for _ in range(depth))
        self.norm_final, self.norm_out = ops.LayerNorm(dim), CogVideoXAdaLayerNorm(time, dim, ops)
        self.proj_out = ops.Linear(dim, channels * 4 * (patch_size_t or 1))

    def forward(self, x, timestep, context, ofs=None, transformer_options=None, **_more: Any) -> Tensor:
        frames, (height, width), depth = x.shape[2], x.shape[3:], self.patch_size_t or 1
        x = F.pad(x, (0, 0, 0, 0, 0, -frames % depth), mode="replicate").transpose(1, 2)
        emb = self.time_embedding_linear_2(F.silu(self.time_embedding_linear_1(waves(timestep, self.dim).to(x.dtype))))
        tokens = self.patch_embed(context, x)
        txt, img = tokens[:, : context.shape[1]], tokens[:, context.shape[1] :]
        for block in self.blocks:
            img, txt = block(
                hidden_states=img, encoder_hidden_states=txt, temb=emb, image_rotary_emb=None, transformer_options=transformer_options
            )
        out = self.proj_out(self.norm_out(self.norm_final(img), temb=emb))
        out = out.unflatten(-1, (-1, depth, 2, 2)).unflatten(1, (-1, height // 2, width // 2))  # B T H W C t 2 2
        return out.permute(0, 4, 1, 5, 2, 6, 3, 7).flatten(6, 7).flatten(4, 5).flatten(2, 3)[:, :, :frames]


# -- Anima --------------------------------------------------------------------------------------------


class Adapter(nn.Module):
    """Turns the language model's text into the tokens that T5's ids ask for."""

    def __init__(self, width: int, ops: Any) -> None:
        super().__init__()
        self.embed, self.blocks, self.out_proj = ops.Linear(1, width), nn.ModuleList([ops.Linear(width, width)]), ops.Linear(width, width)

    def forward(self, source_hidden_states: Tensor, target_input_ids: Tensor) -> Tensor:
        asking = self.embed(target_input_ids[..., None].to(source_hidden_states))
        return self.out_proj(asking + self.blocks[0](attend(asking[:, None], source_hidden_states[:, None], source_hidden_states[:, None])))


class Block(predict2.Block):
    """Adds results of sublayers, which have the precision of the modulation, in the precision of the stream."""

    def forward(
        self, x_B_T_H_W_D, emb_B_T_D, crossattn_emb, rope_emb_L_1_1_D=None, adaln_lora_B_T_3D=None,  # noqa: N803
        extra_per_block_pos_emb=None, transformer_options={},  # noqa: B006
    ):  # fmt: skip
        x, grid, rope = x_B_T_H_W_D, x_B_T_H_W_D.shape[1:4], {"rope_emb": rope_emb_L_1_1_D, "transformer_options": transformer_options}
        sublayers = {
            "self_attn": lambda y: self.self_attn(y.flatten(1, 3), None, **rope).unflatten(1, grid),
            "cross_attn": lambda y: self.cross_attn(y.flatten(1, 3), crossattn_emb, **rope).unflatten(1, grid),
            "mlp": self.mlp,
        }
        for name, sublayer in sublayers.items():
            vectors = getattr(self, f"adaln_modulation_{name}")(emb_B_T_D) + adaln_lora_B_T_3D
            shift, scale, gate = vectors[:, :, None, None].chunk(3, -1)
            y = (getattr(self, f"layer_norm_{name}")(x) * (1 + scale) + shift).to(emb_B_T_D.dtype)
            x = torch.addcmul(x, gate.to(x.dtype), sublayer(y).to(x.dtype))
        return x


class TimestepEmbedding(predict2.TimestepEmbedding):
    def forward(self, sample: Tensor) -> tuple[Tensor, Tensor | None]:
        return super().forward(sample.to(self.linear_1.weight.dtype))


class FinalLayer(predict2.FinalLayer):
    def forward(self, x: Tensor, emb: Tensor, **more: Any) -> Tensor:
        return super().forward(x.to(emb.dtype), emb, **more)


class Anima(predict2.MiniTrainDIT):
    """The host's own Cosmos-Predict2 with newer blocks and the adapter. In float16, the stream between blocks is float32."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.llm_adapter = Adapter(kwargs["crossattn_emb_channels"], kwargs["operations"])
        self.final_layer.__class__, self.t_embedder[1].__class__ = FinalLayer, TimestepEmbedding
        for block in self.blocks:
            block.__class__ = Block

    def prepare_embedded_sequence(self, *args: Any, **kwargs: Any) -> tuple[Any, ...]:
        x, *positions = super().prepare_embedded_sequence(*args, **kwargs)
        return x.float() if x.dtype is torch.float16 else x, *positions

    def preprocess_text_embeds(self, text_embeds: Tensor, text_ids: Tensor) -> Tensor:
        return F.pad(self.llm_adapter(text_embeds, text_ids), (0, 0, 0, 2))


class AnimaHost(StandIn):
    def extra_conds(self, **kwargs: Any) -> dict[str, Any]:
        text = self.diffusion_model.preprocess_text_embeds(kwargs["cross_attn"].to(self.get_dtype()), kwargs["t5xxl_ids"][None])
        return super().extra_conds(**kwargs) | {"c_crossattn": comfy.conds.CONDRegular(text)}

"""The image families' blocks written out from their submodules, independent of the pack. Every sublayer is computed for all tokens.

A reference takes a block, its call's arguments by name, and `settle(name, value, stream)`. That returns the value with which the block
goes on: what a sublayer has just computed, what was kept of it, or a mixture by token. `stream` names the stream whose chosen tokens are
computed; without it, all are kept.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor

Settle = Callable[..., Tensor]


def parts(vector: Tensor, count: int) -> tuple[Tensor, ...]:
    """Splits (B, count·C) into `count` tensors (B, 1, C)."""
    return vector.unflatten(-1, (count, -1)).unsqueeze(2).unbind(1)


def moved(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return x * (1 + scale) + shift


def qwen(block: Any, call: dict, settle: Settle) -> tuple[Tensor, Tensor]:
    img, txt = call["hidden_states"], call["encoder_hidden_states"]
    i, t = parts(block.img_mod(call["temb"]), 6), parts(block.txt_mod(call["temb"]), 6)
    img_in, txt_in = moved(block.img_norm1(img), i[0], i[1]), moved(block.txt_norm1(txt), t[0], t[1])
    img_attn, txt_attn = block.attn(img_in, txt_in, image_rotary_emb=call["image_rotary_emb"])
    img, txt = img + i[2] * settle("img attn", img_attn), txt + t[2] * settle("txt attn", txt_attn)
    img = img + i[5] * settle("img mlp", block.img_mlp(moved(block.img_norm2(img), i[3], i[4])), "img")
    txt = txt + t[5] * settle("txt mlp", block.txt_mlp(moved(block.txt_norm2(txt), t[3], t[4])), "txt")
    return txt, img


def sd3(block: Any, call: dict, settle: Settle) -> tuple[Tensor | None, Tensor]:
    (txt, img), c = call["args"], call["kwargs"]["c"]
    text, image, n = block.context_block, block.x_block, txt.shape[1]
    t, i = parts(text.adaLN_modulation(c), 2 if text.pre_only else 6), parts(image.adaLN_modulation(c), 9 if image.x_block_self_attn else 6)

    def attend(*halves: tuple[Any, Tensor]) -> Tensor:
        """Attends over all tokens of all halves, each a module and its input, and returns (B, L, C) before the last layer."""
        q, k, v = zip(*((*_heads(module, x),) for module, x in halves))
        return F.scaled_dot_product_attention(torch.cat(q, 2), torch.cat(k, 2), torch.cat(v, 2)).transpose(1, 2).flatten(2)

    joint = attend((text.attn, moved(text.norm1(txt), t[0], t[1])), (image.attn, moved(image.norm1(img), i[0], i[1])))
    second = image.attn2.proj(attend((image.attn2, moved(image.norm1(img), i[6], i[7])))) if image.x_block_self_attn else None
    img = img + i[2] * settle("img attn", image.attn.proj(joint[:, n:]))
    if second is not None:
        img = img + i[8] * settle("img attn2", second)
    img = img + i[5] * settle("img mlp", image.mlp(moved(image.norm2(img), i[3], i[4])), "img")
    if text.pre_only:
        return None, img
    txt = txt + t[2] * settle("txt attn", text.attn.proj(joint[:, :n]))
    return txt + t[5] * settle("txt mlp", text.mlp(moved(text.norm2(txt), t[3], t[4])), "txt"), img


def _heads(attn: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Returns q, k and v (B, heads, L, d)."""
    q, k, v = attn.qkv(x).unflatten(-1, (3, -1, attn.head_dim)).permute(2, 0, 3, 1, 4)
    return attn.ln_q(q), attn.ln_k(k), v


def lumina(block: Any, call: dict, settle: Settle) -> Tensor:
    x = call["x"]
    scale, gate, scale_mlp, gate_mlp = parts(block.adaLN_modulation(call["adaln_input"]), 4)
    attn = block.attention(block.attention_norm1(x) * (1 + scale), call["x_mask"], call["freqs_cis"])
    x = x + torch.tanh(gate) * block.attention_norm2(settle("attn", attn))
    mlp = block.feed_forward(block.ffn_norm1(x) * (1 + scale_mlp))
    return x + torch.tanh(gate_mlp) * block.ffn_norm2(settle("mlp", mlp, "txt+img+padding"))


def omnigen(block: Any, call: dict, settle: Settle) -> Tensor:
    x = call["hidden_states"]
    scale, gate, scale_mlp, gate_mlp = parts(block.norm1.linear(F.silu(call["temb"])), 4)
    normed = block.norm1.norm(x) * (1 + scale)
    x = x + torch.tanh(gate) * block.norm2(settle("attn", block.attn(normed, normed, call["attention_mask"], call["image_rotary_emb"])))
    mlp = block.feed_forward(block.ffn_norm1(x) * (1 + scale_mlp))
    return x + torch.tanh(gate_mlp) * block.ffn_norm2(settle("mlp", mlp, "txt+ref+img"))


def hidream_double(block: Any, call: dict, settle: Settle) -> tuple[Tensor, Tensor]:
    inner, img, txt = block.block, call["image_tokens"], call["text_tokens"]
    m = parts(inner.adaLN_modulation(call["adaln_input"]), 12)
    img_in, txt_in = moved(inner.norm1_i(img), m[0], m[1]), moved(inner.norm1_t(txt), m[6], m[7])
    img_attn, txt_attn = inner.attn1(img_in, call["image_tokens_masks"], txt_in, rope=call["rope"])
    img, txt = img + m[2] * settle("img attn", img_attn), txt + m[8] * settle("txt attn", txt_attn)
    img = img + m[5] * settle("img mlp", _experts(inner.ff_i, moved(inner.norm3_i(img), m[3], m[4])), "img")
    txt = txt + m[11] * settle("txt mlp", inner.ff_t(moved(inner.norm3_t(txt), m[9], m[10])), "txt")
    return img, txt


def hidream_single(block: Any, call: dict, settle: Settle) -> Tensor:
    inner, x = block.block, call["image_tokens"]
    m = parts(inner.adaLN_modulation(call["adaln_input"]), 6)
    attn = inner.attn1(moved(inner.norm1_i(x), m[0], m[1]), call["image_tokens_masks"], rope=call["rope"])
    x = x + m[2] * settle("attn", attn)
    return x + m[5] * settle("mlp", _experts(inner.ff_i, moved(inner.norm3_i(x), m[3], m[4])), "img+txt")


def _experts(moe: Any, x: Tensor) -> Tensor:
    """Runs every expert on every token and weights the results, with 0 where an expert was not selected."""
    scores = (x @ moe.gate.weight.T).softmax(-1)
    lowest = scores.topk(moe.num_activated_experts, -1).values[..., -1:]
    weights = torch.where(scores >= lowest, scores, 0)
    return moe.shared_experts(x) + sum(weights[..., i : i + 1] * expert(x) for i, expert in enumerate(moe.experts))


def hydit(block: Any, call: dict, settle: Settle) -> Tensor:
    x, places = call["x"], call["freq_cis_img"]
    if call["skip"] is not None:
        x = block.skip_linear(block.skip_norm(torch.cat((x, call["skip"]), -1)))
    x = x + settle("attn", block.attn1(block.norm1(x) + block.default_modulation(call["c"])[:, None], places)[0])
    x = x + settle("cross", block.attn2(block.norm3(x), call["text_states"], places)[0], "img")
    return x + settle("mlp", block.mlp(block.norm2(x)), "img")


def stable_audio(block: Any, call: dict, settle: Settle) -> Tensor:
    x, given, beside = call["x"], call["global_cond"], call.get("local_add_cond")
    zero, one = x.new_zeros(()), x.new_ones(())  # without modulation, every gate is open
    m = (zero, zero, one, zero, zero, one)
    if given is not None:
        m = parts(block.to_scale_shift_gate + given, 6)
        m = (*m[:2], 1 / (1 + (m[2] - 1).exp()), *m[3:5], 1 / (1 + (m[5] - 1).exp()))
    attn = block.self_attn(block.pre_norm(x) * (1 + m[0]) + m[1], rotary_pos_emb=call["rotary_pos_emb"])
    x = x + m[2] * settle("attn", attn)
    x = x + settle("cross", block.cross_attn(block.cross_attend_norm(x), context=call["context"]), "time+audio")
    if beside is not None:
        more = block.to_local_embed(beside)
        x = torch.cat((x[:, : -more.shape[1]], x[:, -more.shape[1] :] + more), 1)
    return x + m[5] * settle("mlp", block.ff(block.ff_norm(x) * (1 + m[3]) + m[4]), "time+audio")


def aura_double(block: Any, call: dict, settle: Settle) -> tuple[Tensor, Tensor]:
    txt, img = call["c"], call["x"]
    t, i = parts(block.modC(call["global_cond"]), 6), parts(block.modX(call["global_cond"]), 6)
    txt_attn, img_attn = block.attn(moved(block.normC1(txt), t[0], t[1]), moved(block.normX1(img), i[0], i[1]))
    txt_mid = block.normC2(txt + t[2] * settle("txt attn", txt_attn))
    img_mid = block.normX2(img + i[2] * settle("img attn", img_attn))
    return (
        txt + t[5] * settle("txt mlp", block.mlpC(moved(txt_mid, t[3], t[4])), "txt"),
        img + i[5] * settle("img mlp", block.mlpX(moved(img_mid, i[3], i[4])), "img"),
    )


def aura_single(block: Any, call: dict, settle: Settle) -> Tensor:
    x = call["cx"]
    m = parts(block.modCX(call["global_cond"]), 6)
    middle = block.norm2(x + m[2] * settle("attn", block.attn(moved(block.norm1(x), m[0], m[1]))))
    return x + m[5] * settle("mlp", block.mlp(moved(middle, m[3], m[4])), "txt+img")


class References(NamedTuple):
    """A model's lists of blocks, in the order in which it runs them, each with its path and reference."""

    lists: tuple[tuple[str, Callable], ...]

    def blocks(self, net: torch.nn.Module) -> list[tuple[str, int, int, torch.nn.Module, Callable]]:
        """Returns for every block: its list's path, its number there, the list's length, the block, and its reference."""
        found = [(path, list(net.get_submodule(path).children()), reference) for path, reference in self.lists]
        return [(path, i, len(blocks), block, reference) for path, blocks, reference in found for i, block in enumerate(blocks)]


REFERENCES = {
    "qwen_image": References((("transformer_blocks", qwen),)),
    "sd3": References((("joint_blocks", sd3),)),
    "lumina": References((("layers", lumina),)),
    "omnigen": References((("layers", omnigen),)),
    "hidream": References((("double_stream_blocks", hidream_double), ("single_stream_blocks", hidream_single))),
    "hydit": References((("blocks", hydit),)),
    "stable_audio": References((("transformer.layers", stable_audio),)),
    "aura": References((("double_layers", aura_double), ("single_layers", aura_single))),
}


def arguments(forward: Callable, args: tuple, kwargs: dict) -> dict:
    """Returns a call's arguments by the names that the host's forward has for them."""
    bound = signature(forward).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)

"""ACE-Step 1.5: blocks of self-attention, cross-attention to lyrics, timbre and text, and feed-forward over audio frames, two to a token.

Source: comfy/ldm/ace/ace_step15.py of ComfyUI 0.33.0, where it is tested; older hosts have no such class.
Blocks return a new tensor; modulation is one vector a call, added to a table in the block. Every other block's self-attention sees a window
only, by a mask over all frames. The latent enters beside hints (from audio codes, or from the reference) that do not change in a sampling.
The host makes conditioning anew at every evaluation. The blocks of its lyric and timbre encoders feed only the cross-attention: a skipped
evaluation leaves them out. Those that make hints feed the first layer and stay. The host fills the reference up to the song's length.
Not counted: the tokenizer, which makes hints of a reference where there are no audio codes.
"""

from __future__ import annotations

from operator import attrgetter
from typing import Any

from torch import Tensor, nn

from ..kinds import Kind
from .as_read import blocks_take, has, takes
from .base import Lengths, ModelFamily, Stack, linear_weights
from .counting import around_macs, blocks_macs
from .linears import StackLinears

_SEEN = "lyrics+timbre+txt"  # in this order: the host packs them without masks
_BLOCK = ("hidden_states", "temb", "encoder_hidden_states", "position_embeddings", "attention_mask", "encoder_attention_mask")
_ENCODER = (
    "text_hidden_states", "text_attention_mask", "lyric_hidden_states", "lyric_attention_mask",
    "refer_audio_acoustic_hidden_states_packed", "refer_audio_order_mask",
)  # fmt: skip
_LYRICS, _TIMBRE, _HINTS = "encoder.lyric_encoder.layers", "encoder.timbre_encoder.layers", "detokenizer.layers"
_LINEARS = (StackLinears("decoder.layers", {"cross_attn.k_proj": _SEEN, "cross_attn.v_proj": _SEEN, "": "audio"}),)


def _attention_width(path: str) -> Any:
    """Channels of all heads of a list's attention: they need not be the stream's."""
    layers = attrgetter(path)

    def width(model: nn.Module) -> int:
        attention = layers(model)[0].self_attn
        return int(attention.num_heads) * int(attention.head_dim)

    return width


_BLOCKS = blocks_macs(
    _LINEARS, (("decoder.layers", "audio", "audio"), ("decoder.layers", "audio", _SEEN)), _attention_width("decoder.layers")
)
_LYRIC_BLOCKS = blocks_macs((StackLinears(_LYRICS, {"": "lyrics"}),), ((_LYRICS, "lyrics", "lyrics"),), _attention_width(_LYRICS))
_TIMBRE_BLOCKS = blocks_macs((StackLinears(_TIMBRE, {"": "frames"}),), ((_TIMBRE, "frames", "frames"),), _attention_width(_TIMBRE))
_AROUND = around_macs(
    {
        "encoder.timbre_encoder.embed_tokens": "frames",
        "encoder.text_projector": "txt",
        "encoder.lyric_encoder.embed_tokens": "lyrics",
        "decoder.condition_embedder": _SEEN,
        "decoder.time_embed": "",
        "decoder.time_embed_r": "",
    }
)


def _is_ace_step15(model: nn.Module) -> bool:
    return (
        type(model).__name__ == "AceStepConditionGenerationModel"
        and blocks_take(model, "decoder.layers", *_BLOCK)
        and all(blocks_take(model, path, "hidden_states", "position_embeddings", "attention_mask") for path in (_LYRICS, _TIMBRE, _HINTS))
        and takes(model.encoder, *_ENCODER)
        and has(model, "decoder.condition_embedder.out_features", "decoder.norm_out", "encoder.lyric_encoder.embed_tokens")
        and isinstance(model.decoder.proj_in[1], nn.Conv1d)  # type: ignore[index, union-attr]
        and isinstance(model.decoder.proj_out[1], nn.ConvTranspose1d)  # type: ignore[index, union-attr]
    )


def _with_frames(model: Any, lengths: Lengths) -> Lengths:
    """Frames of the latent, and with it of the reference, beside the tokens that are made of them."""
    return {**lengths, "frames": lengths["audio"] * model.decoder.proj_in[1].kernel_size[0]}


def _macs(model: nn.Module, lengths: Lengths, kind: Kind, share: float) -> float:
    lengths = _with_frames(model, lengths)
    return sum(blocks(model, lengths, kind, share) for blocks in (_BLOCKS, _LYRIC_BLOCKS, _TIMBRE_BLOCKS))


def _outside_macs(model: Any, lengths: Lengths) -> float:
    """Hints come five frames to a group, which is what their attention sees: its products are left out."""
    ends = [conv.in_channels * conv.out_channels * conv.kernel_size[0] for conv in (model.decoder.proj_in[1], model.decoder.proj_out[1])]
    lengths, group = _with_frames(model, lengths), model.pool_window_size
    hints = linear_weights(model.detokenizer.layers, model.detokenizer.proj_out) + linear_weights(model.detokenizer.embed_tokens) / group
    return _AROUND(model, lengths) + lengths["audio"] * sum(ends) + lengths["frames"] * hints


def _frames(embed: Any, given: Tensor) -> Tensor:
    """The frames (B, L, d) that one token is made of. given: (B, channels, frames), filled up to whole tokens."""
    side = embed[1].kernel_size[0]
    return given.unfold(2, side, side).movedim(1, 2).flatten(2)


def _input_channels(model: Any) -> int:
    conv = model.decoder.proj_in[1]
    return int(conv.in_channels) * int(conv.kernel_size[0])


def _unencoded(hidden_states: Tensor, *_args: Any, **_call: Any) -> Tensor:
    return hidden_states


ACE_STEP15 = ModelFamily(
    name="ace_step15",
    matches=_is_ace_step15,
    stacks=(
        Stack(
            path="decoder.layers",
            parameters=_BLOCK,
            streams={"hidden_states": "audio"},
            contexts={"encoder_hidden_states": _SEEN},
        ),
    ),
    measures={"encoder.lyric_encoder.embed_tokens": "lyrics", "encoder.text_projector": "txt"},
    hidden="audio",
    channels=attrgetter("decoder.condition_embedder.out_features"),
    embed="decoder.proj_in",
    input_channels=_input_channels,
    tokens=_frames,
    macs=_macs,
    outside_macs=_outside_macs,
    linears=_LINEARS,
    idle=lambda model: tuple((block, _unencoded) for path in (_LYRICS, _TIMBRE) for block in attrgetter(path)(model)),
)

"""LTX-2: video and audio streams of unlike width that look at each other, kept by the model's output alone (`whole_output.py`).

Source: comfy/ldm/lightricks/av_model.py of ComfyUI 0.33.0, where it is tested; 0.3.75 has no such class.
A block takes and returns the pair (video, audio), and two heads read both last states: there is no one hidden state that could be kept.
The model itself takes and returns a list of two latents, (B, 128, T, H, W) and (B, 8, T', 16), which the host packs one behind the other
into (B, 1, numbers). Output is kept in that form, cut into rows of equal length (no more than a form to keep it in), and given back in it.
A video without sound comes in another form and is not skipped. Trap: with guides in the latent the host drops the masked tokens before the
blocks; the multiply-adds are counted with all.
"""

from __future__ import annotations

from collections.abc import Mapping
from operator import attrgetter
from typing import Any

from torch import nn

from ..kinds import Kind
from .as_read import blocks_take, has, takes
from .base import Lengths
from .counting import around_macs, blocks_macs
from .linears import StackLinears
from .whole_output import packed_output

_WIDTH = 8  # divides the numbers of both latents
_MODEL = ("x", "timestep", "context", "attention_mask", "frame_rate", "transformer_options", "keyframe_idxs", "kwargs")
_BLOCK = (
    "x", "v_context", "a_context", "attention_mask", "v_timestep", "a_timestep", "v_pe", "a_pe", "v_cross_pe", "a_cross_pe",
    "v_cross_scale_shift_timestep", "a_cross_scale_shift_timestep", "v_cross_gate_timestep", "a_cross_gate_timestep", "transformer_options",
)  # fmt: skip
_LATER = ("self_attention_mask", "v_prompt_timestep", "a_prompt_timestep")  # what later blocks take beside that
_LAYERS = StackLinears(
    "transformer_blocks",
    {
        "audio_to_video_attn.to_k": "audio",
        "audio_to_video_attn.to_v": "audio",
        "audio_to_video_attn.": "video",
        "video_to_audio_attn.to_k": "video",
        "video_to_audio_attn.to_v": "video",
        "video_to_audio_attn.": "audio",
        "attn2.to_k": "txt",
        "attn2.to_v": "txt",
        "audio_attn2.to_k": "txt",
        "audio_attn2.to_v": "txt",
        "audio_": "audio",
        "": "video",
    },
)
_ATTENTION = (("transformer_blocks", "video", "video"), ("transformer_blocks", "video", "txt"))
_VIDEO = blocks_macs((_LAYERS,), _ATTENTION, attrgetter("inner_dim"))
_AROUND = around_macs(
    {
        "patchify_proj": "video",
        "audio_patchify_proj": "audio",
        "adaln_single": "",
        "audio_adaln_single": "",
        "av_ca_video_scale_shift_adaln_single": "",
        "av_ca_a2v_gate_adaln_single": "",
        "av_ca_audio_scale_shift_adaln_single": "",
        "av_ca_v2a_gate_adaln_single": "",
        "proj_out": "video",
        "audio_proj_out": "audio",
    }
)
_CAPTIONS = around_macs({"caption_projection": "txt", "audio_caption_projection": "txt"})


def _counts(call: Mapping[str, Any], _lengths: Lengths) -> Lengths:
    """A token is one place of the video's grid, or one moment of the sound."""
    latents = call["latents"]
    if latents is None:
        return {"video": 0, "audio": 0}
    return {"video": latents[0][0, 0].numel(), "audio": latents[1].shape[2]}


def _macs(model: Any, lengths: Lengths) -> float:
    """Both kinds of attention beside the video's own have heads as wide as the audio stream."""
    video, audio, txt = lengths["video"], lengths["audio"], lengths["txt"]
    products = audio * (audio + txt) + 2 * video * audio
    total = _VIDEO(model, lengths, Kind.FULL, 1.0) + 2 * len(model.transformer_blocks) * products * model.audio_inner_dim
    return total + _AROUND(model, lengths) + (0.0 if getattr(model, "caption_proj_before_connector", False) else _CAPTIONS(model, lengths))


def _is_ltxav(model: nn.Module) -> bool:
    return (
        type(model).__name__ == "LTXAVModel"
        and takes(model, *_MODEL)
        and any(blocks_take(model, "transformer_blocks", *_BLOCK, *_LATER[:more]) for more in (0, 1, 3))
        and has(model, "inner_dim", "audio_inner_dim", "in_channels", "patchify_proj", "audio_proj_out", "a_patchifier")
    )


LTXAV = packed_output("ltxav", _is_ltxav, _WIDTH, _macs, parameters=_MODEL[:-1], counts=_counts)

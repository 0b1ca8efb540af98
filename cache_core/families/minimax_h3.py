"""MiniMax H3: video and sound in one packed sequence of text, conditions, sound and video; kept by the output alone (`whole_output.py`).

Source: comfy/ldm/minimax/model.py of ComfyUI 0.33.0, where it is tested, and of Comfy-Org/ComfyUI, read at 01a56b76 and 2c64d4aa, whose
blocks take one argument more. The family is younger than ComfyUI 0.3.75.

Why the output alone: the host may run the forward inside a recorded plan of its memory ("malloc graph"). What would be kept or left out
between the blocks does not fit such a plan, and the memory would be given to others. Its own outputs it makes before that and fills last.

The model takes and returns a list of two latents, (1, 24, T, H, W) and (1, 32, 2, T'), one row at a time, so every cond comes in a call of
its own. Sound runs on noise levels of its own, a function of the video's. Counted as they usually are: text that was refined before the
run, as many noise levels as there are kinds of sampled and of given tokens. `to_gate_compress`, where a checkpoint has it, is not called
by dense attention.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

from torch import Tensor

from ..kinds import Kind
from .as_read import blocks_take, has, layers_are, takes
from .base import Lengths, ModelFamily
from .counting import around_macs, blocks_macs
from .linears import StackLinears
from .whole_output import packed_output

_WIDTH = 8  # what the numbers of a place of video, 24, and of a moment of sound, 64, have in common
_JOINT = "txt+cond+audio+video"
_MODEL = ("x", "timestep", "context", "transformer_options", "minimax_payload", "denoise_mask", "audio_denoise_mask", "kwargs")
_BLOCK = ("x", "t_emb", "mod_segments", "rope_freqs", "transformer_options")
_LATER = ("attention",)  # what later blocks take beside that
_AROUND = (
    "video_patch_proj", "audio_patch_proj", "condition_proj", "token_refiner.blocks", "rope.inv_freq", "final_layer.adaln_proj.linear",
    "final_layer.video_out", "final_layer.audio_out", "latents_dim", "audio_latents_dim",
)  # fmt: skip
_LAYERS = ("attn.qkv_proj", "attn.out_proj", "mlp.fc1", "mlp.fc2", "adaln_proj.linear")
_BLOCKS = blocks_macs(
    (StackLinears(path="blocks", streams={"adaln_proj.": "levels", "": _JOINT}, skip=("attn.to_gate_compress",)),),
    (("blocks", _JOINT, _JOINT),),
    lambda model: model.blocks[0].attn.out_proj.in_features,  # type: ignore[index, union-attr]
)
_OUTSIDE = around_macs(
    {
        "video_patch_proj": "video+cond",  # what is given is nearly all pictures
        "audio_patch_proj": "audio",
        "time_embedder": "levels",
        "final_layer.adaln_proj": "levels",
        "final_layer.video_out": "video",
        "final_layer.audio_out": "audio",
    }
)


def _is_minimax_h3(model: Any) -> bool:
    if type(model).__name__ != "MiniMaxH3Model" or not takes(model, *_MODEL) or not has(model, *_AROUND):
        return False
    if getattr(model, "patch_size", None) != (1, 2, 2) or model.latents_dim % _WIDTH or 2 * model.audio_latents_dim % _WIDTH:
        return False
    if not any(blocks_take(model, "blocks", *_BLOCK, *more) for more in ((), _LATER)):
        return False
    return layers_are(model, "blocks", *_LAYERS) or layers_are(model, "blocks", *_LAYERS, "attn.to_gate_compress")


def _patches(latent: Tensor) -> int:
    """Of a video (1, C, T, H, W)."""
    frames, rows, columns = latent.shape[2:]
    return int(frames * ceil(rows / 2) * ceil(columns / 2))


def _counts(call: Mapping[str, Any], _lengths: Lengths) -> Lengths:
    if call["latents"] is None:
        return {"video": 0, "audio": 0, "cond": 0, "levels": 0}
    (video, audio), given = call["latents"], call.get("minimax_payload") or {}
    pictures = [_patches(latent) for latent in given.get("cond_video_latents", ())]
    sounds = [2 * latent.shape[-1] for latent in given.get("cond_audio_latents", ())]
    levels = 2 + bool(pictures) + bool(sounds)
    return {"video": _patches(video), "audio": 2 * audio.shape[-1], "cond": sum(pictures + sounds), "levels": levels}


def _macs(model: Any, lengths: Lengths) -> float:
    return _BLOCKS(model, lengths, Kind.FULL, 1.0) + _OUTSIDE(model, lengths)


MINIMAX_H3: ModelFamily = packed_output("minimax_h3", _is_minimax_h3, _WIDTH, _macs, parameters=_MODEL[:-1], counts=_counts)

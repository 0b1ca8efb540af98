"""HunyuanVideo, HunyuanVideo 1.5, HunyuanImage 2.1 and its refiner: one class of FLUX's blocks, in one of two orders of the joint tokens.

Source: comfy/ldm/hunyuan_video/model.py (ComfyUI 0.3.75 and 0.33.0). Joint tokens are image, text in older hosts, whose blocks bear a flag
for it, and text, image in those that dropped the flag. A reference latent is put before the image inside the image stream after both went
through the embedding, and cut off before the head: its tokens are among the hidden ones, but calibrated forecasts, which need the input of
all, cannot be had with one. A guiding frame makes two rows of modulation, one for the first frame's tokens and one for all others. 1.5 and
2.1 put tokens of other encoders beside the text: they count as text.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

from .base import Lengths, ModelFamily, linear_weights
from .counting import around_macs, patches
from .flux import FLUX_AROUND
from .flux_blocks import flux_like, has_flux_blocks

_around = around_macs({**FLUX_AROUND, "txt_in": "txt", "time_r_in": ""})


def _patch_channels(model: Any) -> int:
    return model.in_channels * prod(model.patch_size)


def _outside_macs(model: Any, lengths: Lengths) -> float:
    """What is around the blocks, with the text refiner's attention; parts of it see the text's mean only."""
    refiner, txt = model.txt_in, lengths["txt"]
    blocks = refiner.individual_token_refiner.blocks
    vectors = linear_weights(refiner.t_embedder, refiner.c_embedder, *(block.adaLN_modulation for block in blocks))
    return _around(model, lengths) - (txt - 1) * vectors + len(blocks) * 2 * txt * txt * model.hidden_size


def _is_hunyuan_video(image_first: bool, model: Any) -> bool:
    if not has_flux_blocks(model, "HunyuanVideo", own_modulation=True) or not hasattr(model, "txt_in"):
        return False
    return bool(getattr(model.double_blocks[0], "flipped_img_txt", False)) == image_first


def _family(image_first: bool) -> ModelFamily:
    return flux_like(
        name="hunyuan_video",
        matches=partial(_is_hunyuan_video, image_first),
        outside_macs=_outside_macs,
        joint="img+txt" if image_first else "txt+img",
        embed="img_in.proj",  # the convolution: what is around it fills the picture up to whole patches
        input_channels=_patch_channels,
        tokens=patches,
    )


HUNYUAN_VIDEO, HUNYUAN_VIDEO_IMAGE_FIRST = _family(image_first=False), _family(image_first=True)

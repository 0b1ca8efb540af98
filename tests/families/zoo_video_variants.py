"""Lists models of the video families in other forms than the zoo's: another modulation, references, control, sound."""

from __future__ import annotations

from unittest.mock import patch

import comfy.ldm.wan.model_animate
import comfy.supported_models
import torch
import zoo_video
from making import Case, text
from zoo_video import clip_picture, seeded, wan_case, wan_model

FRAMES = torch.ones(1, 1, 3, 8, 6)
FRAMES[:, :, 0] = 0  # a first frame that is given


def _ref_conv():
    return wan_model(comfy.supported_models.WAN21_T2V, "t2v", in_dim_ref_conv=16)


def _wan22_5b():
    return wan_model(comfy.supported_models.WAN22_T2V, "t2v", in_dim=48, out_dim=48)


def _camera():
    """Makes enough blocks to outweigh the convolutions over pixels before them."""
    return wan_model(comfy.supported_models.WAN22_Camera, "camera_2.2", in_dim=36, num_layers=8)


def animate():
    """Makes the model of zoo_video so wide that its attention to faces, whose size is fixed, does not outweigh the blocks."""
    with patch.object(comfy.ldm.wan.model_animate, "Generator", lambda **_sizes: torch.nn.Identity()):
        return wan_model(comfy.supported_models.WAN22_Animate, "animate", in_dim=36, num_layers=5, dim=192, num_heads=8, ffn_dim=384)


def _expert_i2v():
    return wan_model(comfy.supported_models.WAN21_T2V, "t2v", in_dim=36)


CLIP, REFERENCE = clip_picture(), seeded(1, 16, 1, 8, 6)
FRAME_WISE = Case("wan", _wan22_5b, (48, 3, 8, 6), text(7, 24, denoise_mask=FRAMES), lambda m: m.blocks[-1])
LTXV = next(case for case in zoo_video.CASES if case.name == "ltxv")
LTXV_TOKEN_WISE = LTXV._replace(
    cond=text(7, 24, attention_mask=torch.ones(1, 7).int(), denoise_mask=torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1).expand(1, 1, 2, 4, 3))
)
PREDICT2 = next(case for case in zoo_video.CASES if case.name == "cosmos_predict2")
PREDICT2_FRAME_WISE = PREDICT2._replace(cond=text(7, 24, denoise_mask=torch.tensor([0.0, 1.0]).view(1, 1, 2, 1, 1).expand(1, 1, 2, 6, 4)))
VARIANTS = {
    "Wan 2.2 5B, modulation by frame": FRAME_WISE,
    "Wan 2.2 I2V, a picture as channels and one that is ignored": wan_case("wan", _expert_i2v, clip_vision_output=CLIP),
    "Wan I2V without a picture": wan_case("wan_i2v", zoo_video.wan_i2v),
    "Wan Fun, a reference before the video": wan_case("wan", _ref_conv, reference_latents=[REFERENCE]),
    "Wan Camera": wan_case("wan", _camera, camera_conditions=seeded(1, 24, 3, 64, 48)),
    "Wan S2V with sound and a reference": wan_case(
        "wan_s2v", zoo_video.wan_s2v, audio_embed=seeded(1, 25, 8, 12).abs(), reference_latents=[REFERENCE]
    ),
    "Wan HuMo with a reference": wan_case("wan_humo", zoo_video.wan_humo, audio_embed=seeded(1, 3, 8, 5, 8), reference_latents=[REFERENCE]),
    "Wan HuMo without sound": wan_case("wan_humo", zoo_video.wan_humo),
    "LTXV, modulation by token": LTXV_TOKEN_WISE,
    "Cosmos-Predict2, modulation by frame": PREDICT2_FRAME_WISE,
}


def vace(videos: int) -> Case:
    frames, masks = [seeded(1, 32, 3, 8, 6, seed=i) for i in range(videos)], [torch.ones(1, 64, 3, 8, 6)] * videos
    return wan_case("wan_vace", zoo_video.wan_vace, vace_frames=frames, vace_mask=masks)

"""Lists small models with random weights, of the host's own classes where it has them: one entry each, described by a file or not."""

from __future__ import annotations

import comfy.supported_models
from comfy.model_patcher import ModelPatcher
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from making import Case, text, tiny
from zoo_dit import CASES as CASES_DIT
from zoo_flux_like import CASES as CASES_FLUX_LIKE
from zoo_image import CASES as CASES_IMAGE
from zoo_newest import CASES as CASES_NEWEST
from zoo_opensora import CASES as CASES_OPENSORA
from zoo_stand_ins import CASES as CASES_STAND_INS
from zoo_undescribed import CASES as CASES_UNDESCRIBED
from zoo_video import CASES as CASES_VIDEO


def _flux() -> Case:
    return Case(
        "flux", load_demo_model, (3, 24, 24), lambda seed: encode_prompt(["castle", "banana"][seed % 2]), lambda m: m.single_blocks[-1]
    )


def _qwen_image() -> Case:
    def make() -> ModelPatcher:
        return tiny(
            comfy.supported_models.QwenImage, image_model="qwen_image", in_channels=64, num_layers=3, attention_head_dim=16,
            num_attention_heads=2, joint_attention_dim=24, axes_dims_rope=(4, 6, 6),
        )  # fmt: skip

    return Case("qwen_image", make, (16, 1, 12, 16), text(7, 24), lambda m: m.transformer_blocks[-1])


_REAL = {case.name for case in CASES_NEWEST}
_STAND_INS = [case for case in CASES_STAND_INS if case.name not in _REAL]  # of classes that this host does not have
CASES = (
    _flux(), _qwen_image(), *CASES_FLUX_LIKE, *CASES_VIDEO, *CASES_IMAGE, *CASES_DIT, *CASES_OPENSORA, *CASES_NEWEST, *_STAND_INS,
    *CASES_UNDESCRIBED,
)  # fmt: skip

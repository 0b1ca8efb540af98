"""Lists models of FLUX's blocks in other forms than the zoo's: references, ControlNets, masks, kin of Hunyuan Video."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import comfy.controlnet
import comfy.supported_models
import torch
from making import Case, text
from zoo_flux_like import chroma, chroma_radiance, flux2, hunyuan3d, hunyuan_video


def noise(*shape: int, seed: int = 3, scale: float = 1.0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale


class Control(comfy.controlnet.ControlBase):
    """A ControlNet with constant residuals for every block and image token."""

    def __init__(self, tokens: int, channels: int) -> None:
        super().__init__()
        self.residuals = {place: [noise(1, tokens, channels, seed=i, scale=0.3) for i in range(2)] for place in ("input", "output")}

    def get_control(self, *_args: Any) -> dict:
        return self.residuals

    def copy(self) -> Control:
        return self


class Variant(NamedTuple):
    """A case with its numbers of tokens.

    Args:
        case: The case.
        tokens: Of the image.
        beside: Tokens of references in the image's stream, which may be kept with it.
        has_input: Whether calibrated forecasts are possible.
    """

    case: Case
    tokens: int
    beside: int = 0
    has_input: bool = True


def _variant(
    make: Callable, latent: tuple, tokens: int, cond: Callable, beside: int = 0, cfg: float = 2.0, has_input: bool = True
) -> Variant:
    return Variant(Case("", make, latent, cond, lambda net: net.single_blocks[-1], cfg=cfg), tokens, beside, has_input)


def hunyuan_15() -> Any:
    return hunyuan_video(
        comfy.supported_models.HunyuanVideo15, in_channels=65, out_channels=32, patch_size=[1, 1, 1], vec_in_dim=None, byt5=True,
        use_cond_type_embedding=True, vision_in_dim=20, guidance_embed=False,
    )  # fmt: skip


def hunyuan_image() -> Any:
    return hunyuan_video(
        comfy.supported_models.HunyuanImage21, in_channels=64, out_channels=64, patch_size=[1, 1], axes_dim=[64, 64], vec_in_dim=None,
        meanflow=True,
    )  # fmt: skip


def given(tokens: int = 7, **more: Any) -> Callable[[int], list]:
    return text(tokens, 24, pooled_output=torch.ones(1, 768), **more)


def controlled(tokens: int, channels: int) -> Callable[[int], list]:
    return given(control=Control(tokens, channels), control_apply_to_uncond=True)


VIDEO, PICTURE, F2 = (16, 3, 8, 6), (16, 12, 16), (128, 4, 6)
MASK, CLIP = torch.tensor([[1, 1, 1, 1, 1, 0, 0]]), SimpleNamespace(last_hidden_state=noise(1, 4, 20))
REFERENCE, FRAME = {"ref_latent": noise(1, 16, 1, 8, 6)}, {"guiding_frame_index": 0}
BESIDE = {"conditioning_byt5small": noise(1, 3, 1472), "clip_vision_output": CLIP}
VARIANTS = {
    "flux2": _variant(flux2, F2, 24, given()),
    "flux2 references": _variant(flux2, F2, 24, given(reference_latents=[noise(1, 128, 2, 3), noise(1, 128, 3, 4)]), beside=18),
    "flux2 control": _variant(flux2, F2, 24, controlled(20, 32)),
    "chroma": _variant(chroma, PICTURE, 48, given()),
    "chroma control": _variant(chroma, PICTURE, 48, controlled(48, 48)),
    "radiance": _variant(chroma_radiance, (3, 24, 32), 48, given()),
    "video": _variant(hunyuan_video, VIDEO, 36, given(40)),
    "video control": _variant(hunyuan_video, VIDEO, 36, controlled(36, 128)),
    "video mask": _variant(hunyuan_video, VIDEO, 36, given(attention_mask=MASK), cfg=1.0),
    "video guiding frame": _variant(hunyuan_video, VIDEO, 36, given(**FRAME), cfg=1.0),
    "video reference": _variant(hunyuan_video, VIDEO, 36, given(**REFERENCE), beside=12, cfg=1.0, has_input=False),
    "video both": _variant(hunyuan_video, VIDEO, 36, given(**FRAME, **REFERENCE), beside=12, cfg=1.0, has_input=False),
    "video 1.5": _variant(hunyuan_15, (32, 2, 4, 6), 48, given(**BESIDE)),
    "image 2.1": _variant(hunyuan_image, (64, 6, 8), 48, given()),
    "3d": _variant(hunyuan3d, (64, 24), 24, given()),
}

"""The families with FLUX's blocks: FLUX.1, FLUX.2, Chroma, Chroma Radiance, Hunyuan3D 2.0, HunyuanVideo and other models of its class.

Sources: comfy/ldm/{flux,chroma,chroma_radiance,hunyuan_video,hunyuan3d}/model.py (ComfyUI 0.3.75 and 0.33.0). HunyuanVideo 1.5 and
HunyuanImage 2.1 with its refiner have HunyuanVideo's class. There the tokens of a reference latent are put before those of the image after
both are embedded, so calibrated forecasts, which need the input of all tokens, do not work with a reference latent. Hosts concatenate text
and image in different orders; the order does not matter here.
"""

from __future__ import annotations

from .shared.flux_blocks import flux_like, has_flux_blocks
from .shared.patches import patches

FLUX = flux_like(
    name="flux",
    matches=lambda model: has_flux_blocks(model, "Flux", own_modulation=True),
)
FLUX2 = flux_like(
    name="flux2",
    matches=lambda model: has_flux_blocks(model, "Flux", own_modulation=False),
)
CHROMA = flux_like(
    name="chroma",
    matches=lambda model: has_flux_blocks(model, "Chroma", own_modulation=False),
)
CHROMA_RADIANCE = flux_like(
    name="chroma_radiance",
    matches=lambda model: has_flux_blocks(model, "ChromaRadiance", own_modulation=False) and hasattr(model, "img_in_patch"),
    embed="img_in_patch",  # `img_in` is a method here
    tokens=patches,
)
HUNYUAN_VIDEO = flux_like(
    name="hunyuan_video",
    matches=lambda model: has_flux_blocks(model, "HunyuanVideo", own_modulation=True) and hasattr(model, "txt_in"),
    embed="img_in.proj",  # the convolution, as the module around it first pads the picture to whole patches
    tokens=patches,
)
HUNYUAN3D = flux_like(
    name="hunyuan3d",
    matches=lambda model: has_flux_blocks(model, "Hunyuan3Dv2", own_modulation=True) and hasattr(model, "latent_in"),
    embed="latent_in",
)

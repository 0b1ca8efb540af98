"""Node Load DiT (class-conditional): loads a checkpoint that ComfyUI's own loaders do not know."""

from __future__ import annotations

from pathlib import Path

import folder_paths
from comfy_api.latest import io

from .dit.model import load_dit
from .dit.weights import SUFFIXES

_FOLDERS = ("diffusion_models", "checkpoints")


class LoadDiT(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return io.Schema(
            node_id="DuCaLoadDiT",
            display_name="Load DiT (class-conditional)",
            category="model_patches/duca",
            description="Loads a DiT that draws the 1000 classes of ImageNet, such as DiT-XL-2-256x256.pt. Use it with ImageNet Class, an "
            "empty latent of the model's size, sampler ddim with scheduler ddim_uniform, and a VAE of Stable Diffusion 1.",
            inputs=[
                io.Combo.Input(
                    "dit_name",
                    options=names(),
                    tooltip="A .safetensors or .pt file in models/diffusion_models or models/checkpoints. Other models are refused.",
                )
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For DuCa Cache or the sampler.")],
        )

    @classmethod
    def execute(cls, dit_name: str) -> io.NodeOutput:
        return io.NodeOutput(load_dit(_path_of(dit_name)))


def names() -> list[str]:
    """Returns the files of both folders that could be a DiT."""
    found = {name for folder in _FOLDERS for name in folder_paths.get_filename_list(folder)}
    return sorted(name for name in found if name.lower().endswith(SUFFIXES))


def _path_of(name: str) -> Path:
    """Returns the path of a file. If both folders have it, it is the one in diffusion_models."""
    paths = [path for folder in _FOLDERS if (path := folder_paths.get_full_path(folder, name)) is not None]
    if not paths:
        raise ValueError(f"{name} is neither in models/diffusion_models nor in models/checkpoints; press R to refresh the list")
    return Path(paths[0])

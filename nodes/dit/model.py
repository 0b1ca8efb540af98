"""Makes a MODEL of the host from a DiT checkpoint, with its noise levels, its latents and its class label.

The host samples it. Three things differ from the sampler that was published with DiT: the host guides all four channels of the noise,
and that one only the first three; the learned variance is dropped, as DDIM needs none; and the scheduler ddim_uniform takes the times 1,
21, 41 … of 1000, and the published sampler 0, 20, 40 …
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any, ClassVar

import comfy.conds
import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.supported_models_base
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from .detect import NotADiTError, name_of, shape_of
from .network import DiT, DiTShape
from .weights import open_weights

CLASS_LABEL = "class_label"  # key in a conditioning; the value is a whole number (1,)
NO_CLASS = -1  # label of the null class, whatever its number in the model


class ClassConditionalDiT(comfy.model_base.BaseModel):
    """A DiT as a model of the host. It predicts the noise (EPS); a conditioning has its class under CLASS_LABEL."""

    def __init__(self, model_config: DiTConfig, device: Any = None) -> None:
        super().__init__(model_config, comfy.model_base.ModelType.EPS, device=device, unet_model=DiT)

    def extra_conds(self, **kwargs: Any) -> dict[str, comfy.conds.CONDRegular]:
        """Returns the class for the network. Raises ValueError for a conditioning without a class, or for an unknown one."""
        label, classes = kwargs.get(CLASS_LABEL), self.diffusion_model.shape.classes
        if label is None:
            raise ValueError("a DiT draws classes and reads no text: connect ImageNet Class to the sampler's positive and negative")
        if int(label.max()) > classes or int(label.min()) < NO_CLASS:
            raise ValueError(f"there is no class {label.tolist()[0]}: this DiT knows 0 to {classes - 1}, and {classes} for none")
        return {"y": comfy.conds.CONDRegular(torch.where(label == NO_CLASS, classes, label))}


class DiTConfig(comfy.supported_models_base.BASE):
    """The host's configuration of a DiT. `unet_config` is {"shape": DiTShape}."""

    unet_extra_config: ClassVar[dict[str, Any]] = {}
    latent_format = comfy.latent_formats.SD15  # scale 0.18215
    # "sqrt_linear" is the host's name for betas in equal steps; its "linear" has their roots in equal steps.
    sampling_settings: ClassVar = {"beta_schedule": "sqrt_linear", "linear_start": 1e-4, "linear_end": 0.02, "timesteps": 1000}

    def __init__(self, unet_config: dict[str, Any]) -> None:
        super().__init__(unet_config)
        self.memory_usage_factor = memory_factor(self.unet_config["shape"])

    def get_model(self, state_dict: dict[str, torch.Tensor], prefix: str = "", device: Any = None) -> ClassConditionalDiT:
        return ClassConditionalDiT(self, device=device)


def memory_factor(shape: DiTShape) -> float:
    """Returns the factor by which the host estimates memory per value of the latent.

    It is in proportion to PixArt's 0.5, which is for tokens of 1152 channels and 2 by 2 values.
    """
    return 0.5 * (shape.width / 1152) * (2 / shape.patch) ** 2


def load_dit(path: Path) -> ModelPatcher:
    """Loads a DiT.

    Raises:
        ValueError: For a file that cannot be read, or that is no DiT (before its weights are read), with a message for the user.
    """
    try:
        file = open_weights(path)
        shape = shape_of(file.shapes)
    except NotADiTError as reason:
        raise ValueError(f"{path.name} is not a class-conditional DiT: {reason}") from reason
    weights = {name: tensor for name, tensor in file.read().items() if name != "pos_embed" or shape.grid}
    logging.info("[DuCa] %s is a %s", path.name, name_of(shape))
    config = DiTConfig({"shape": shape})
    load_device, offload_device = comfy.model_management.get_torch_device(), comfy.model_management.unet_offload_device()
    dtype = comfy.model_management.unet_dtype(
        model_params=comfy.utils.calculate_parameters(weights),
        supported_dtypes=config.supported_inference_dtypes,
        weight_dtype=comfy.utils.weight_dtype(weights),
    )
    config.set_inference_dtype(dtype, comfy.model_management.unet_manual_cast(dtype, load_device, config.supported_inference_dtypes))
    model = config.get_model({}, device=offload_device)
    model.load_model_weights(weights)
    patcher = ModelPatcher(model, load_device=load_device, offload_device=offload_device)
    patcher.cached_patcher_init = (load_dit, (path,))  # hosts that split guidance over several GPUs load a copy of their own
    return patcher

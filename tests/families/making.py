"""Makes small models with random weights through the host's own classes. Not part of zoo.py, as that imports every group's cases."""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, NamedTuple
from unittest.mock import patch

import comfy.model_detection
import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher


class Case(NamedTuple):
    """A small model and how it is sampled.

    Args:
        name: Of its family.
        make: Makes the model.
        latent: Shape without the batch; or one for each part, if the host samples several together.
        cond: Makes a conditioning from a seed.
        last: Finds the last block of the network.
        calls: Model calls of an evaluation: two if the model never takes both conds in one.
        cfg: Guidance; 1.0 if the host cannot put both conds into one call.
    """

    name: str
    make: Callable[[], ModelPatcher]
    latent: tuple[Any, ...]
    cond: Callable[[int], list]
    last: Callable[[Any], torch.nn.Module]
    calls: int = 1
    cfg: float = 2.0


def tiny(config: type, **unet: Any) -> ModelPatcher:
    """Returns a model of the host's `config` class with these dimensions and repeatable random weights, in float32 on the CPU.

    Fields that only some hosts ask for need not be in `unet`: the host's own detection finds them.
    """
    try:
        model = made(config, unet)
    except TypeError:  # this host asks for a field that is lacking
        model = made(config, {**asked_beside(config, unet), **unet})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
            else:  # norms' scales near one, biases near zero
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) * 0.1
                    + float("norm" in name and name.endswith(("weight", "scale", "gamma")))
                )
    model.eval()
    return ModelPatcher(model, load_device=comfy.model_management.get_torch_device(), offload_device=torch.device("cpu"))


def made(config: type, unet: dict[str, Any]) -> Any:
    conf = config(unet)
    conf.set_inference_dtype(torch.float32, None)
    return conf.get_model({}, "")


def asked_beside(config: type, unet: dict[str, Any]) -> dict[str, Any]:
    """Returns the fields that this host's dataclasses of sizes require and `unet` lacks, as the host's detection finds them.

    The detection gets the keys and shapes of a skeleton without memory, which is made with None for the lacking fields.
    """
    lacking: list[str] = []

    def lenient(original: Callable[..., None], required: list[str]) -> Callable[..., None]:
        def init(self: Any, **given: Any) -> None:
            missing = [name for name in required if name not in given]
            lacking.extend(missing)
            original(self, **given, **dict.fromkeys(missing))

        return init

    with ExitStack() as patches:
        for cls in sized_by_dataclass():
            required = [f.name for f in fields(cls) if f.default is MISSING and f.default_factory is MISSING]
            patches.enter_context(patch.object(cls, "__init__", lenient(cls.__init__, required)))
        skeleton = config(unet).get_model({}, "", device=torch.device("meta"))
    found = comfy.model_detection.detect_unet_config(skeleton.diffusion_model.state_dict(), "")
    return {name: found[name] for name in lacking}


def sized_by_dataclass() -> list[type]:
    """Returns the host's dataclasses, among them those whose fields are a network's sizes."""
    homes = [module for name, module in sys.modules.items() if name.startswith("comfy.ldm.")]
    classes = {cls for home in homes for cls in vars(home).values() if isinstance(cls, type) and is_dataclass(cls)}
    return [cls for cls in classes if cls.__module__.startswith("comfy.ldm.")]


def text(tokens: int, channels: int, **more: Any) -> Callable[[int], list]:
    """Returns a function that makes conditioning with random text tokens from a seed."""

    def cond(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        return [[torch.randn(1, tokens, channels, generator=generator), dict(more)]]

    return cond


def other_signature(module: torch.nn.Module) -> None:
    """Gives a module's forward one more argument, as a later host's may have."""
    original = type(module).forward

    def forward(self, *args, another=None, **kwargs):
        return original(self, *args, **kwargs)

    module.__class__ = type(type(module).__name__, (type(module),), {"forward": forward})

"""Makes small models with random weights through the host's own classes. Apart from zoo.py, which imports every group's cases."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher


class Case(NamedTuple):
    """make: the model. latent: shape of one. cond: conditioning from a seed, of `tokens` text tokens.

    last: its last block. hidden: where in what that returns the hidden state is, None for a bare tensor.
    calls: model calls of an evaluation, two where the model never takes both conds in one. needs_both: where it cannot be without.
    """

    name: str
    make: Callable[[], ModelPatcher]
    latent: tuple[int, ...]
    cond: Callable[[int], list]
    last: Callable[[Any], torch.nn.Module]
    hidden: int | None = None
    calls: int = 1
    needs_both: bool = False


def tiny(config: type, **unet: Any) -> ModelPatcher:
    """A model of the host's `config` class with these dimensions and repeatable random weights, in float32 on the CPU."""
    conf = config(unet)
    conf.set_inference_dtype(torch.float32, None)
    model = conf.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in model.diffusion_model.named_parameters():
            if weight.ndim > 1:
                weight.copy_(torch.randn(weight.shape, generator=generator) / weight[0].numel() ** 0.5)
            else:  # norms' scales near one, biases near zero
                weight.copy_(
                    torch.randn(weight.shape, generator=generator) * 0.1 + float("norm" in name and name.endswith(("weight", "scale")))
                )
    model.eval()
    return ModelPatcher(model, load_device=comfy.model_management.get_torch_device(), offload_device=torch.device("cpu"))


def text(tokens: int, channels: int, **more: Any) -> Callable[[int], list]:
    """Conditioning with random text tokens."""

    def cond(seed: int) -> list:
        generator = torch.Generator().manual_seed(seed)
        return [[torch.randn(1, tokens, channels, generator=generator), dict(more)]]

    return cond

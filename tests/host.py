"""Shared by tests on the host: the demo model, sampling through ComfyUI's own functions, a picture distance."""

from __future__ import annotations

import comfy.sample
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_duca.cache_core import RunReport, Settings
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt


def sample(model: ModelPatcher, *, prompt="red apple", negative="", steps=12, cfg=2.5, sampler="euler", scheduler="simple",
           seed=0, size=(48, 48), batch=1, positive=None, latent=None, **more) -> torch.Tensor:  # fmt: skip
    """What KSampler does: a latent (batch, 3, *size)."""
    latent = torch.zeros(batch, 3, *size) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    positive = encode_prompt(prompt) if positive is None else positive
    negative = encode_prompt(negative) if isinstance(negative, str) else negative
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, seed=seed, disable_pbar=True, **more
    )


def cached(model: ModelPatcher, **settings) -> ModelPatcher:
    """The model with a cache of these `Settings`."""
    return host.attach(model, Settings(**settings))


def last_report(model: ModelPatcher) -> RunReport:
    book = host.book_of(model)
    assert book is not None and book.last is not None, "the model has not been sampled with a cache"
    return book.last


def kinds(report: RunReport) -> str:
    """The kinds of a run's evaluations as a plan is written."""
    return "".join(e.letter for e in report.evaluations)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Mean over the batch, in dB, of latents in -1..1."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())


def perturbed(model: ModelPatcher) -> ModelPatcher:
    """Every weight moved by 1 %, in place, as another checkpoint in the same network."""
    g = torch.Generator().manual_seed(4)
    for w in model.model.diffusion_model.parameters():
        w.data.mul_(1 + 0.01 * torch.randn(w.shape, generator=g))
    return model


def patcher_of(network: torch.nn.Module) -> ModelPatcher:
    model = torch.nn.Module()
    model.diffusion_model = network
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))

"""Samples the demo model through ComfyUI's own functions, and reads what a run reports.

The last part has functions for what tests must ask differently of different hosts.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sample
import pytest
import torch
from comfy.ldm.flux.model import Flux
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfyui_duca.cache_core import CacheRun, ModelCall, Places, RunReport, RunStart, Settings, Timeline, find_family
from comfyui_duca.cache_core.discovery.places import Known
from comfyui_duca.cache_core.engine.linear_sites import LinearSite, linear_sites
from comfyui_duca.cache_core.planning.policies import FixedInterval
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt


def sample(model: ModelPatcher, *, prompt="red apple", negative="", steps=12, cfg=2.5, sampler="euler", scheduler="simple",
           seed=0, size=(48, 48), batch=1, positive=None, latent=None, **more) -> torch.Tensor:  # fmt: skip
    """Samples as KSampler does and returns the latent (batch, 3, *size)."""
    latent = torch.zeros(batch, 3, *size) if latent is None else latent
    noise = comfy.sample.prepare_noise(latent, seed)
    positive = encode_prompt(prompt) if positive is None else positive
    negative = encode_prompt(negative) if isinstance(negative, str) else negative
    return comfy.sample.sample(
        model, noise, steps, cfg, sampler, scheduler, positive, negative, latent, seed=seed, disable_pbar=True, **more
    )


def cached(model: ModelPatcher, **settings) -> ModelPatcher:
    """Returns the model with a cache of these `Settings`."""
    return host.attach(model, Settings(**settings))


def last_report(model: ModelPatcher) -> RunReport:
    book = host.book_of(model)
    assert book is not None and book.last is not None, "the model has not been sampled with a cache"
    return book.last


def kinds(report: RunReport) -> str:
    """Returns the kinds of a run's evaluations, written as a plan is."""
    return "".join(e.letter for e in report.evaluations)


def psnr(a: torch.Tensor, b: torch.Tensor) -> float:
    """Returns the PSNR in dB of latents in -1..1, as the mean over the batch."""
    error = (a.clamp(-1, 1) - b.clamp(-1, 1)).square().flatten(1).mean(1)
    return float((10 * torch.log10(4 / error)).mean())


def known_of(network: torch.nn.Module, size=(48, 48), conds: int = 1) -> Known:
    """Returns what a full evaluation of the demo network shows: where its hidden state and its linear layers are."""
    places = Places()
    run = CacheRun(Strategy(FixedInterval(2)), RunStart(network, find_family(network), Timeline([1.0, 0.0]), range(1), places=places))
    context, extra = encode_prompt("red apple")[0]
    context, pooled = context.repeat(conds, 1, 1), extra["pooled_output"].repeat(conds, 1)
    x = torch.randn(conds, 3, *size, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode(), run.evaluation(1.0):
        run.model_call(ModelCall(network, range(conds), 0), lambda: network(x.clone(), torch.ones(conds), context.clone(), pooled))
    run.close()
    known = places.latest(network)
    assert known is not None
    return known


def linear_sites_of(network: torch.nn.Module, size=(48, 48)) -> list[LinearSite]:
    """Returns the linear layers of the demo network that get tokens."""
    return linear_sites(find_family(network), known_of(network, size).layer_calls, network)


def perturbed(model: ModelPatcher) -> ModelPatcher:
    """Changes every weight by 1 %, in place, so that the network holds another checkpoint."""
    g = torch.Generator().manual_seed(4)
    for w in model.model.diffusion_model.parameters():
        w.data.mul_(1 + 0.01 * torch.randn(w.shape, generator=g))
    return model


def patcher_of(network: torch.nn.Module) -> ModelPatcher:
    model = torch.nn.Module()
    model.diffusion_model = network
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def change_for_all(model: ModelPatcher) -> dict:
    """Returns the patches of a LoRA that changes every weight by several percent."""
    g = torch.Generator().manual_seed(3)
    named = model.model.diffusion_model.named_parameters()
    return {f"diffusion_model.{name}": ("diff", (0.05 * torch.randn(w.shape, generator=g),)) for name, w in named}


def with_lora(model: ModelPatcher) -> ModelPatcher:
    clone = model.clone()
    assert clone.add_patches(change_for_all(model))
    return clone


@torch.no_grad()
def load(model: ModelPatcher) -> None:
    """Loads the model as the host does before it samples."""
    comfy.model_management.load_models_gpu([model])


# -- what is asked differently of each host ---------------------------------------------------------------


def as_called(node: type[io.ComfyNode], unique_id: str) -> type[io.ComfyNode]:
    """Returns the node class as the host has it while it executes: it knows its id, which hosts pass alone or among other data."""
    hidden = {io.Hidden.unique_id: unique_id}
    is_bare = "hidden_inputs" in inspect.signature(node.PREPARE_CLASS_CLONE).parameters
    return node.PREPARE_CLASS_CLONE(hidden if is_bare else {"hidden_inputs": hidden})


def split_calls(monkeypatch: pytest.MonkeyPatch, when: Callable[[int], bool] = lambda call: True) -> None:
    """Makes the host send cond and uncond in separate calls, as it does when memory is short.

    Args:
        when: Says for the nth time that the host asks for free memory whether it is short. Hosts ask in several ways; all call the
            function that is patched here.
    """
    asked: list[int] = []

    def free_memory(*_args, **_kwargs) -> int:
        asked.append(1)
        return 0 if when(len(asked)) else 2**40

    monkeypatch.setattr(comfy.model_management, "get_free_memory", free_memory)


def flux_1(depth: int, depth_single: int) -> Flux:
    """Returns a network with FLUX.1's shapes and no memory for weights. The host detects its fields from a checkpoint's weights."""
    shapes = {
        "img_in.weight": (3072, 64), "txt_in.weight": (3072, 4096), "vector_in.in_layer.weight": (3072, 768),
        "guidance_in.in_layer.weight": (3072, 256), "double_blocks.0.img_attn.norm.key_norm.scale": (128,),
        **{f"double_blocks.{i}.img_attn.qkv.weight": (9216, 3072) for i in range(depth)},
        **{f"single_blocks.{i}.linear1.weight": (21504, 3072) for i in range(depth_single)},
    }  # fmt: skip
    config = comfy.model_detection.detect_unet_config({name: torch.empty(shape, device="meta") for name, shape in shapes.items()}, "")
    assert config is not None and config.pop("image_model") == "flux"
    return Flux(**config, dtype=torch.bfloat16, device="meta", operations=comfy.ops.disable_weight_init)

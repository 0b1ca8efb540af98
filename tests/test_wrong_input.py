"""Models that the pack does not serve come back untouched, and the user is told why, once."""

from __future__ import annotations

import comfy.latent_formats
import comfy.model_management
import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_duca.cache_core import Settings
from comfyui_duca.nodes import host
from comfyui_duca.nodes.duca_cache import DucaCache
from host import cached, kinds, last_report, sample


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr(host, "say", lambda text, node_id=None: texts.append(text))
    return texts


def patcher(config) -> ModelPatcher:
    config.set_inference_dtype(torch.float32, None)
    model = config.get_model({}, "")
    generator = torch.Generator().manual_seed(0)
    for parameter in model.diffusion_model.parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)
    return ModelPatcher(model, torch.device("cpu"), torch.device("cpu"))


def unet() -> ModelPatcher:
    """The host's UNet as SD 1.5 configures it, narrow."""
    return patcher(
        comfy.supported_models.SD15(
            {
                "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1, 1],
                "channel_mult": [1, 2], "num_heads": 2, "use_spatial_transformer": True, "transformer_depth": [1, 1],
                "transformer_depth_output": [1, 1, 1, 1], "transformer_depth_middle": 1, "context_dim": 64,
                "use_linear_in_transformer": False, "adm_in_channels": None, "legacy": False,
            }
        )
    )  # fmt: skip


def unknown_dit() -> ModelPatcher:
    """A diffusion transformer of the host's that no family matches."""
    from comfy.ldm.hunyuan3d.model import Hunyuan3Dv2

    config = {"image_model": "hunyuan3d2", "in_channels": 4, "hidden_size": 64, "context_in_dim": 64, "num_heads": 4, "depth": 1,
              "depth_single_blocks": 1, "mlp_ratio": 4.0, "qkv_bias": True, "guidance_embed": False}  # fmt: skip
    model = patcher(comfy.supported_models.Hunyuan3Dv2(config))
    model.model.diffusion_model.__class__ = type("TomorrowsDiT", (Hunyuan3Dv2,), {})
    return model


@pytest.mark.parametrize(("make", "words"), [(unet, "UNetModel is a UNet"), (unknown_dit, "does not know the model TomorrowsDiT")])
def test_models_of_no_family_are_passed_through(make, words, said):
    model = make()
    result = cached(model, speedup=3.0)
    assert words in said[0] and len(said) == 1
    assert not result.wrappers and not result.attachments and result.model is model.model


def test_a_unet_samples_as_without_the_node(said):
    model = unet()
    positive = [[torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(1)), {}]]
    runs = [
        sample(m, positive=positive, negative=positive, latent=torch.zeros(1, 4, 16, 16), steps=3, scheduler="normal")
        for m in (model, cached(model, speedup=3.0))
    ]
    assert torch.isfinite(runs[0]).all() and torch.equal(*runs)


@pytest.mark.parametrize(
    ("wrong", "words"),
    [({"speedup": 0.5}, "speedup"), ({"token_share": 1.5}, "token share"), ({"start_percent": 0.9, "end_percent": 0.1}, "start")],
)
def test_bad_values_that_reach_the_node_by_link_stop_it_before_sampling(wrong, words):
    """Validation cannot see linked values; the node itself refuses them."""
    values = {
        "model": None, "mode": "auto", "speedup": 2.0, "predictor": "chebyshev", "cycle_length": 0, "token_share": 0.1, "warmup": -1,
        "tail": 0, "start_percent": 0.0, "end_percent": 1.0, "store_device": "auto", "store_dtype": "model dtype", "token_seed": 0,
        "verbose": False,
    }  # fmt: skip
    with pytest.raises(ValueError, match=words):
        DucaCache.execute(**{**values, **wrong})


def test_rising_noise_levels_are_announced_and_passed_through(said):
    """A schedule that adds noise, as inversion does."""
    from comfyui_duca.nodes.demo_flux import load_demo_model

    model = load_demo_model()
    sigmas = torch.linspace(0.1, 0.9, 5)
    result = sample(cached(model, speedup=3.0), steps=4, sigmas=sigmas)
    assert torch.equal(result, sample(model, steps=4, sigmas=sigmas))
    assert "noise levels of this run rise" in said[0] and len(said) == 1


def test_noise_that_rises_between_evaluations_starts_the_cache_anew(said):
    """heunpp2 looks two steps ahead and comes back."""
    from comfyui_duca.nodes.demo_flux import load_demo_model

    patched = cached(load_demo_model(), speedup=3.0)
    sample(patched, sampler="heunpp2", steps=6)
    report = last_report(patched)
    levels = [e.sigma for e in report.evaluations]
    for previous, level, kind in zip(levels, levels[1:], kinds(report)[1:]):
        assert level <= previous or kind == "F"
    assert sum("noise level rose" in text for text in said) == 1


def test_a_network_that_the_host_does_not_sample_is_passed_through(said):
    """As some packs return from a loader under the type MODEL."""
    network = torch.nn.Linear(2, 2)
    assert host.attach(network, Settings()) is network
    assert said == ["DuCa Cache serves models that ComfyUI samples; Linear is passed through unchanged."]

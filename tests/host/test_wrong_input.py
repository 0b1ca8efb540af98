"""Models that the pack does not serve come back unchanged, and the user reads why, once."""

from __future__ import annotations

import math
import re

import comfy.latent_formats
import comfy.model_management
import comfy.supported_models
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_duca.cache_core import Settings
from comfyui_duca.nodes import host
from comfyui_duca.nodes.cache_schedule import CacheSchedule
from comfyui_duca.nodes.duca_cache import DucaCache
from comfyui_duca.nodes.host import cached_model
from helpers.other_networks import patcher, unet
from helpers.sampling import cached, kinds, last_report, sample


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr(cached_model, "say", lambda text, node_id=None: texts.append(text))
    return texts


def unknown_dit() -> ModelPatcher:
    """Returns a diffusion transformer of a class that no file describes."""
    from comfy.ldm.hunyuan3d.model import Hunyuan3Dv2

    config = {"image_model": "hunyuan3d2", "in_channels": 4, "hidden_size": 64, "context_in_dim": 64, "num_heads": 4, "depth": 1,
              "depth_single_blocks": 1, "mlp_ratio": 4.0, "qkv_bias": True, "guidance_embed": False}  # fmt: skip
    model = patcher(comfy.supported_models.Hunyuan3Dv2(config))
    model.model.diffusion_model.__class__ = type("TomorrowsDiT", (Hunyuan3Dv2,), {})
    return model


def test_a_unet_is_passed_through(said):
    model = unet()
    result = cached(model, speedup=3.0)
    assert "UNetModel is a UNet" in said[0] and len(said) == 1
    assert not result.wrappers and not result.attachments and result.model is model.model


def test_a_transformer_that_no_file_describes_is_served(said):
    positive = [[torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(1)), {}]]
    model = cached(unknown_dit(), speedup=3.0)
    sample(model, positive=positive, negative=positive, latent=torch.zeros(1, 4, 32), steps=12, scheduler="simple")
    report = last_report(model)
    assert report.family == "tomorrowsdit" and report.place == "found and proved: skips double_blocks, single_blocks"
    assert sum(evaluation.skipped > 0 for evaluation in report.evaluations) == 8 and not said


def test_a_unet_samples_as_without_the_node(said):
    model = unet()
    positive = [[torch.randn(1, 7, 64, generator=torch.Generator().manual_seed(1)), {}]]
    runs = [
        sample(m, positive=positive, negative=positive, latent=torch.zeros(1, 4, 16, 16), steps=3, scheduler="normal")
        for m in (model, cached(model, speedup=3.0))
    ]
    assert torch.isfinite(runs[0]).all() and torch.equal(*runs)


CACHE = {
    "model": None, "mode": "auto", "speedup": 2.0, "predictor": "chebyshev", "cycle_length": 0, "token_share": 0.1, "warmup": -1,
    "tail": 0, "start_percent": 0.0, "end_percent": 1.0, "store_device": "auto", "store_dtype": "model dtype", "token_seed": 0,
    "verbose": False,
}  # fmt: skip
SCHEDULE = {
    "kind": "front-loaded", "speedup": 2.0, "cycle_length": 0, "text": "F", "unit": "percent", "skip_from": 0.0, "skip_to": 100.0,
    "warmup": 1, "tail": 0, "several_evaluations": "as their step",
}  # fmt: skip
NUMBERS = ("0,5", "0.5", math.nan, math.inf, -math.inf, True, None, [0.5], torch.ones(2))
COUNTS = ("3", 2.5, math.nan, True, [3])


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"speedup": 0.5}, "speedup"),
        ({"token_share": 1.5}, "token share"),
        ({"start_percent": 0.9, "end_percent": 0.1}, "start"),
        *(({name: value}, words) for name, words in (("speedup", "speedup"), ("token_share", "token share"),
          ("start_percent", "start"), ("end_percent", "end")) for value in NUMBERS),
        *(({name: value}, words) for name, words in (("cycle_length", "cycle length"), ("warmup", "warm-?up"), ("tail", "tail"),
          ("token_seed", "seed")) for value in COUNTS),
        *(({name: value}, name) for name in ("mode", "predictor", "store_device", "store_dtype") for value in ("none", 5, ["auto"], None)),
        *(({"calibration": value}, "calibration must be connected to the output of SVD Calibrator") for value in ("mine", 5, {})),
        *(({"schedule": value}, "schedule must be connected to the output of Cache Schedule") for value in ("3F", 5, {})),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bad_values_that_reach_the_node_by_link_stop_it_before_sampling(wrong, words):
    """Validation does not see linked values. The node itself refuses them, by name and in words."""
    with pytest.raises(ValueError, match=words):
        DucaCache.execute(**{**CACHE, **wrong})


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        *(({name: value}, name) for name in ("speedup", "skip_from", "skip_to") for value in NUMBERS),
        *(({name: value}, words) for name, words in (("cycle_length", "cycle length"), ("warmup", "warm-up"), ("tail", "tail"))
          for value in COUNTS),
        *(({name: value}, words) for name, words in (("kind", "schedule"), ("unit", "unit"), ("several_evaluations", "several"))
          for value in ("none", 5, ["F"])),
        ({"kind": "custom text", "text": 5}, "written as text"),
        ({"calibration": "mine"}, "calibration must be connected to"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bad_values_of_a_schedule(wrong, words):
    with pytest.raises(ValueError, match=words):
        CacheSchedule.execute(**{**SCHEDULE, **wrong})
    said = CacheSchedule.validate_inputs(**{**SCHEDULE, **wrong})
    assert None in wrong.values() or re.search(words, str(said))


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        *(({name: value}, f"{name} must be a number from 0 to 1") for name in ("start_percent", "end_percent")
          for value in NUMBERS if value is not None),
        ({"calibration": "mine"}, "Load Calibration"),
        ({"schedule": 3}, "Cache Schedule"),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_bad_values_are_refused_when_queued(wrong, words):
    assert words in str(DucaCache.validate_inputs(**wrong))


def test_right_values_are_taken_when_queued():
    assert DucaCache.validate_inputs() is True and DucaCache.validate_inputs(start_percent=0, end_percent=1) is True
    assert CacheSchedule.validate_inputs(**SCHEDULE) is True


def test_rising_noise_levels_are_announced_and_passed_through(said):
    """Such noise levels add noise, as inversion does."""
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
    """Some packs return such a model from a loader under the type MODEL."""
    network = torch.nn.Linear(2, 2)
    assert host.attach(network, Settings()) is network
    assert said == ["DuCa Cache works on models that ComfyUI itself samples; Linear is passed through unchanged."]

"""On the host's samplers, full evaluations correct the forecasts before them."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfyui_duca.cache_core import Plan
from comfyui_duca.cache_core.planning.policies import FrontLoaded, Given
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import load_demo_model
from helpers.sampling import cached, last_report, psnr, sample


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


def uncorrected(model, speedup: float):
    return host.attach(model, Strategy(FrontLoaded(speedup), AUTO))


@pytest.mark.parametrize("prompt", ["red apple", "tiger face", "castle"])
def test_the_picture_is_closer_to_the_uncached_one(model, prompt):
    reference = sample(model, steps=28, prompt=prompt)
    plain, better = uncorrected(model, 2.8), cached(model, speedup=2.8)
    gain = psnr(sample(better, steps=28, prompt=prompt), reference) - psnr(sample(plain, steps=28, prompt=prompt), reference)
    assert gain > 0.2
    assert last_report(better).corrected == 8 and last_report(plain).corrected == 0  # there are nine gaps, the last of which ends the run


def test_it_works_on_plain_euler_steps_only(model):
    patched = cached(model, speedup=2.0)

    def corrected(sampler: str, **options) -> int:
        chosen = comfy.samplers.ksampler(sampler, options)
        guider = comfy.samplers.CFGGuider(patched)
        guider.set_conds(*([[torch.zeros(1, 12, 64), {"pooled_output": torch.zeros(1, 64)}]] for _ in range(2)))
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 8)
        guider.sample(torch.randn(1, 3, 48, 48), torch.zeros(1, 3, 48, 48), chosen, sigmas, disable_pbar=True, seed=0)
        return last_report(patched).corrected

    assert corrected("euler") > 0
    assert [corrected(name) for name in ("heun", "dpmpp_2m", "euler_ancestral")] == [0, 0, 0]
    assert corrected("euler", s_churn=0.5) == 0


@pytest.mark.parametrize("settings", [{"mode": "paper"}, {"mode": "forecast", "speedup": 2.0}], ids=["paper", "forecast"])
def test_published_methods_stay_as_published(model, settings):
    patched = cached(model, **settings)
    sample(patched)
    assert last_report(patched).corrected == 0


def test_full_steps_without_a_gap_before_them_are_exact(model):
    """Each step's denoised latent is the same, up to the first full step after a skipped one."""

    def steps_of(patched) -> list[torch.Tensor]:
        seen = []
        sample(patched, steps=6, callback=lambda _step, denoised, _x, _total: seen.append(denoised.clone()))
        return seen

    strategy = Strategy(Given(Plan.parse("FFFaFF")), AUTO, corrects=True)
    plain, ours = steps_of(model), steps_of(host.attach(model, strategy))
    assert all(torch.equal(a, b) for a, b in zip(plain[:3], ours[:3]))
    assert not torch.equal(plain[3], ours[3])


def test_what_a_mask_keeps_stays_as_it_is(model):
    mask = torch.zeros(1, 48, 48)
    mask[..., :24] = 1
    kept = torch.rand(1, 3, 48, 48, generator=torch.Generator().manual_seed(5)) - 0.5
    patched = cached(model, speedup=2.0)
    result = sample(patched, latent=kept, noise_mask=mask)
    assert last_report(patched).corrected > 0
    assert torch.allclose(result[..., 24:], kept[..., 24:], atol=1e-5)

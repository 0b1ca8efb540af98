"""Samplers that add noise are computed in full. A trial on numbers shows which do so, and leaves the picture's own noise alone."""

from __future__ import annotations

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.host import samplers
from helpers.sampling import cached, kinds, last_report, psnr, sample

STEPS = 20
QUIET = (
    "euler",
    "ddim",
    "heun",
    "dpm_2",
    "dpmpp_2m",
    "res_multistep",
    "deis",
    "ipndm",
    "uni_pc",
    "lms",
    "gradient_estimation",
    "dpmpp_2m_cfg_pp",
)
NOISY = (
    "euler_ancestral", "lcm", "dpmpp_sde", "dpmpp_2m_sde", "dpmpp_3m_sde", "sa_solver", "seeds_2", "seeds_3", "ddpm",
    "res_multistep_ancestral", "dpm_2_ancestral", "dpmpp_2s_ancestral",
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


@pytest.fixture(scope="module")
def sampling(model):
    return model.get_model_object("model_sampling")


@pytest.fixture(scope="module")
def sigmas(sampling):
    return comfy.samplers.calculate_sigmas(sampling, "simple", STEPS)


@pytest.mark.parametrize("name", [*QUIET, "er_sde"])
def test_samplers_that_add_little_or_none(sampling, sigmas, name):
    assert samplers.adds_noise(sampling, comfy.samplers.sampler_object(name), sigmas) is False


@pytest.mark.parametrize("name", [name for name in NOISY if name in comfy.samplers.SAMPLER_NAMES])
def test_samplers_that_add_noise(sampling, sigmas, name):
    assert samplers.adds_noise(sampling, comfy.samplers.sampler_object(name), sigmas) is True


def test_how_much_noise_by_hand(sampling, sigmas):
    """Flow models' ancestral Euler goes from σ to σ' by way of σ_down = σ'·(1 + (σ'/σ - 1)), scales by (1 - σ') / (1 - σ_down) and adds the
    rest of the variance σ'². So the share 1 - (σ_down/σ' · (1 - σ') / (1 - σ_down))² is new.
    """
    function = comfy.k_diffusion.sampling.sample_euler_ancestral
    measured = samplers.fresh_noise(sampling, function, {}, sigmas)
    for share, (high, low) in zip(measured, zip(sigmas.tolist(), sigmas[1:].tolist())):
        down = low * (1 + (low / high - 1))
        assert share == pytest.approx(1 - (down / low * (1 - low) / (1 - down)) ** 2, abs=0.12)


def test_plain_samplers_add_exactly_none(sampling, sigmas):
    for name in ("euler", "dpmpp_2m", "res_multistep"):
        function = comfy.samplers.sampler_object(name).sampler_function
        assert max(samplers.fresh_noise(sampling, function, {}, sigmas)) < 1e-9


@pytest.mark.parametrize("settings", [{"speedup": 2.0}, {"mode": "paper", "cycle_length": 5}], ids=["auto", "paper"])
def test_a_noisy_sampler_is_computed_in_full_and_said(model, settings):
    patched = cached(model, **settings)
    result = sample(patched, steps=8, sampler="euler_ancestral")
    assert torch.equal(result, sample(model, steps=8, sampler="euler_ancestral"))
    assert set(kinds(last_report(patched))) == {"F"}
    assert [notice for notice in last_report(patched).notices if "adds noise" in notice]


def test_er_sde_is_served(model):
    patched = cached(model, speedup=2.0)
    for _ in range(2):  # a later run proves the place once, at a noise level far from that of the first skip
        result = sample(patched, steps=STEPS, sampler="er_sde")
        assert kinds(last_report(patched)).count("F") == STEPS // 2 and not last_report(patched).notices
    assert psnr(result, sample(model, steps=STEPS, sampler="er_sde")) > 27


def test_churn_counts_by_what_it_adds(sampling, sigmas):
    churned = comfy.samplers.ksampler("euler", {"s_churn": 20.0})
    assert samplers.adds_noise(sampling, churned, sigmas) is True
    assert samplers.adds_noise(sampling, comfy.samplers.ksampler("euler", {"s_churn": 0.0}), sigmas) is False


def test_a_sampler_that_cannot_be_tried_is_not_known(sampling):
    def of_another_pack(model, x, sigmas, extra_args=None, callback=None, disable=None):
        model.inner_model.something_of_its_own()

    sampler = comfy.samplers.KSAMPLER(of_another_pack)
    assert samplers.adds_noise(sampling, sampler, torch.tensor([1.0, 0.5, 0.0])) is None
    assert samplers.adds_noise(sampling, object(), torch.tensor([1.0, 0.5, 0.0])) is None


def test_trying_a_sampler_leaves_the_random_numbers_alone(sampling, sigmas):
    torch.manual_seed(7)
    expected = torch.randn(4)
    torch.manual_seed(7)
    samplers._known.clear()
    samplers.adds_noise(sampling, comfy.samplers.sampler_object("euler_ancestral"), sigmas)
    assert torch.equal(torch.randn(4), expected)


def test_a_sampler_is_tried_once(sampling, sigmas, monkeypatch):
    samplers._known.clear()
    tried, original = [], samplers.fresh_noise
    monkeypatch.setattr(samplers, "fresh_noise", lambda *args: tried.append(1) or original(*args))
    for _ in range(3):
        samplers.adds_noise(sampling, comfy.samplers.sampler_object("dpmpp_2m"), sigmas)
    assert len(tried) == 1


def test_trying_a_sampler_seeds_no_device(sampling, sigmas, monkeypatch):
    """Where a sampler or a patch draws numbers without a seed of its own, the devices' generators make the picture."""
    seeded: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeded.append)
    samplers._known.clear()
    samplers.adds_noise(sampling, comfy.samplers.sampler_object("euler"), sigmas)
    assert not seeded


def test_a_sampler_inside_another_is_not_taken_for_one_that_lay_there(sampling, sigmas):
    """Nodes that change another sampler's noise levels make such samplers. A new one may be at the address of the last one."""

    def bending(model, x, sigmas, *, inner, extra_args=None, callback=None, disable=None):
        return inner.sampler_function(model, x, sigmas, extra_args=extra_args, callback=callback, disable=disable)

    def adds_noise(name):
        return samplers.adds_noise(sampling, comfy.samplers.KSAMPLER(bending, {"inner": comfy.samplers.ksampler(name)}), sigmas)

    assert [adds_noise(name) for name in ("euler", "euler_ancestral") * 20] == [False, True] * 20


def test_samplers_that_break_the_trial_are_not_known(sampling):
    """Tried are a sampler that never ends, one that cannot be hashed, and one that gives NaN."""

    def endless(model, x, sigmas, extra_args=None, callback=None, disable=None):
        while bool((model(x, sigmas[:1]) == 0).all()):
            pass

    def divides_by_zero(model, x, sigmas, extra_args=None, callback=None, disable=None):
        return model(model(x * 0, sigmas[:1]) / 0, sigmas[1:2])

    class Unhashable:
        __hash__ = None

        def __call__(self, model, x, sigmas, extra_args=None, callback=None, disable=None):
            return model(x, sigmas[:1])

    levels = torch.tensor([1.0, 0.5, 0.0])
    assert samplers.adds_noise(sampling, comfy.samplers.KSAMPLER(endless), levels) is None
    assert samplers.adds_noise(sampling, comfy.samplers.KSAMPLER(Unhashable()), levels) is False
    assert samplers.adds_noise(sampling, comfy.samplers.KSAMPLER(divides_by_zero), levels) is None

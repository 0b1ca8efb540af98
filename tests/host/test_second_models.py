"""The cache works with guidance by a second model, and with copies of one model on several devices, each in a thread."""

from __future__ import annotations

import copy
import threading

import comfy.model_management
import comfy.patcher_extension
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, RunStart, Timeline
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.host import cached_model
from helpers.factors import exact_factors
from helpers.sampling import cached, kinds, last_report, perturbed, psnr, sample

try:
    from comfy_extras.nodes_custom_sampler import DualModelGuider
except ImportError:
    DualModelGuider = None

two_models = pytest.mark.skipif(DualModelGuider is None, reason="this ComfyUI has no guider of two models")
STEPS = 12
AUTO = {"mode": "auto", "speedup": 3.0}


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


@pytest.fixture(scope="module")
def other():
    """Returns another checkpoint of the same network."""
    return perturbed(load_demo_model())


def guided(model, negative, sampler="euler") -> torch.Tensor:
    """Returns a latent whose positive side `model` computes and whose negative side `negative` computes."""
    guider = DualModelGuider.execute(model, encode_prompt("red apple"), 2.5, negative, encode_prompt("")).args[0]
    sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS)
    noise = torch.randn(1, 3, 48, 48, generator=torch.Generator().manual_seed(0))
    return guider.sample(noise, torch.zeros(1, 3, 48, 48), comfy.samplers.sampler_object(sampler), sigmas, disable_pbar=True, seed=0)


@two_models
def test_one_cache_serves_both_models_of_a_kind(model, other):
    expected = guided(model, other)
    patched = cached(model, **AUTO)
    result = guided(patched, other)
    report = last_report(patched)
    assert report.count(Kind.FULL) == 4 and all(e.calls == 2 for e in report.evaluations) and not report.notices
    assert report.compute_speedup > 2.5
    assert psnr(result, expected) > 22


@two_models
def test_a_second_model_of_another_kind_passes_through_and_is_told(model):
    """Only its latent channels have to fit. Here it is a small network that no family describes."""

    class Other(torch.nn.Module):
        dtype = torch.float32

        def forward(self, x, timestep, context, y=None, guidance=None, control=None, transformer_options={}, **kwargs):  # noqa: B006
            return x * 0.5

    second = load_demo_model()
    second.model.diffusion_model = Other()
    patched = cached(model, **AUTO)
    result = guided(patched, second)
    report = last_report(patched)
    assert psnr(result, guided(model, second)) > 22
    assert kinds(report).count("a") == 8
    assert any("a second model takes part (Other)" in notice for notice in report.notices)


@two_models
def test_a_cache_on_the_negative_side_works_and_reports(model, other):
    expected = guided(model, other)
    patched = cached(other, mode="auto", speedup=2.0)
    result = guided(model, patched)
    report = last_report(patched)
    assert len(report.evaluations) == STEPS and report.count(Kind.FULL) == 6 and report.is_complete
    assert any("second model of a guider" in notice for notice in report.notices)
    assert psnr(result, expected) > 25 and not torch.equal(result, expected)
    assert torch.equal(guided(model, cached(other, speedup=1.0)), expected)
    assert torch.equal(guided(model, other), expected)  # neither model keeps anything of the cache


@two_models
def test_with_a_cache_on_both_sides_the_guiders_own_serves(model, other):
    first, second = cached(model, **AUTO), cached(other, **AUTO)
    assert torch.equal(guided(first, second), guided(cached(model, **AUTO), other))
    assert last_report(first).count(Kind.FULL) == 4
    assert host.book_of(second).last is None


def test_a_cache_that_stands_aside_says_so_once(model, other, monkeypatch):
    """On the guider's own model and on the other. If asked in every evaluation, it would search for a calibration and say so each time."""
    said: list[str] = []
    monkeypatch.setattr(cached_model, "say", lambda text, _node_id=None: said.append(text))
    rising = torch.tensor([0.1, 0.3, 0.6, 0.9])
    euler, prompts = comfy.samplers.sampler_object("euler"), (encode_prompt("red apple"), encode_prompt(""))
    latent = torch.zeros(1, 3, 48, 48)
    comfy.sample.sample_custom(cached(model, **AUTO), latent, 2.5, euler, rising, *prompts, latent, disable_pbar=True, seed=0)
    assert len(said) == 1 and "is not used in this run" in said[0]
    if DualModelGuider is not None:
        guider = DualModelGuider.execute(model, prompts[0], 2.5, cached(other, **AUTO), prompts[1]).args[0]
        guider.sample(latent, latent, euler, rising, disable_pbar=True, seed=0)
        assert len(said) == 2


@two_models
def test_a_run_as_a_guest_ends_with_an_error_too(model, other, monkeypatch):
    patched = cached(other, **AUTO)
    calls = []

    def breaks(executor, *args, **kwargs):
        calls.append(1)
        if len(calls) == 5:
            raise RuntimeError("broken")
        return executor(*args, **kwargs)

    broken = model.clone()
    broken.add_wrapper_with_key(comfy.patcher_extension.WrappersMP.PREDICT_NOISE, "test", breaks)
    with pytest.raises(RuntimeError, match="broken"):
        guided(broken, patched)
    assert not last_report(patched).is_complete
    assert torch.equal(guided(model, patched), guided(model, cached(other, **AUTO)))


# -- several devices ------------------------------------------------------------------------------------


@pytest.mark.parametrize("plan", ["FaFaFaFa", "FiFiFiFi", "FcFaFcFa"])
def test_calls_in_threads_give_the_same_thirty_times(model, sites, plan):
    """Cond and uncond run at the same time, each in a network of its own. Kinds, bytes and results are as one after the other."""
    networks = [model.model.diffusion_model, copy.deepcopy(model.model.diffusion_model)]
    before = [[module.__dict__.get("forward") for module in network.modules()] for network in networks]
    serial = evaluated(networks[:1] * 2, sites, plan, threaded=False)
    for _ in range(30):
        threaded = evaluated(networks, sites, plan, threaded=True)
        assert threaded[1:] == serial[1:]
        for one, two in zip(threaded[0], serial[0]):
            assert torch.equal(one, two)
    assert [[module.__dict__.get("forward") for module in network.modules()] for network in networks] == before


def evaluated(networks, sites, plan, threaded) -> tuple:
    from comfyui_duca.cache_core import Plan
    from comfyui_duca.cache_core.planning.policies import Given

    factors = exact_factors(sites) if "i" in plan else None
    strategy = Strategy(Given(Plan.parse(plan)), Reuse(), token_share=0.25, factors=factors)
    levels = [1 - i / len(plan) for i in range(len(plan) + 1)]
    run = CacheRun(strategy, RunStart(torch.nn.Module(), FLUX, Timeline(levels), range(len(plan))))
    conds = [encode_prompt(text)[0] for text in ("red apple", "castle")]
    x = torch.randn(1, 3, 12, 12, generator=torch.Generator().manual_seed(1))
    results: list[torch.Tensor] = []
    for sigma in levels[:-1]:
        answers: dict[int, torch.Tensor] = {}

        @torch.inference_mode()
        def call(number: int, sigma=sigma, answers=answers) -> None:
            context, extra = conds[number]
            given = ModelCall(networks[number], ((number, number),), 0, is_copy=number > 0)
            answers[number] = run.model_call(
                given, lambda: networks[number](x * sigma, torch.tensor([sigma]), context, extra["pooled_output"])
            )

        with run.evaluation(sigma):
            run.cond_batch()
            if threaded:
                threads = [threading.Thread(target=call, args=(number,)) for number in (0, 1)]
                [thread.start() for thread in threads]
                [thread.join() for thread in threads]
            else:
                [call(number) for number in (0, 1)]
        results += [answers[0], answers[1]]
    report = run.close(is_complete=True)
    return results, [e.letter for e in report.evaluations], [e.calls for e in report.evaluations], report.peak_bytes, tuple(report.notices)


@pytest.mark.skipif(not hasattr(comfy.samplers, "_calc_cond_batch_multigpu"), reason="this ComfyUI has no MultiGPU CFG Split")
@pytest.mark.parametrize("settings", [AUTO, {"mode": "paper", "cycle_length": 4, "token_share": 0.2}], ids=["auto", "paper"])
def test_multigpu_cfg_split_of_the_host(model, settings, monkeypatch):
    """Scheduler, threads and copies of the model are the host's own. Both devices are this CPU."""
    patched = cached(model, **settings)
    together = sample(patched)
    plan = kinds(last_report(patched))
    second = patched.deepclone_multigpu(new_load_device=torch.device("cpu", 1))
    second.is_multigpu_base_clone = True  # the host's node marks it so
    devices = {torch.device("cpu"): patched, torch.device("cpu", 1): second}

    def prepared(_patcher, _loaded, model_options):
        model_options["multigpu_clones"] = devices
        return [second]

    monkeypatch.setattr(comfy.sampler_helpers, "prepare_model_patcher_multigpu_clones", prepared)
    monkeypatch.setattr(comfy.model_management, "set_torch_device", lambda _device: None)
    apart = sample(patched)
    report = last_report(patched)
    assert kinds(report) == plan and all(e.calls == 2 for e in report.evaluations) and not report.notices
    assert psnr(apart, together) > 60
    networks = (patched.model.diffusion_model, second.model.diffusion_model)
    assert networks[0] is not networks[1]
    assert not any("forward" in module.__dict__ for network in networks for module in network.modules())

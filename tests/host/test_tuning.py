"""Calibration on the host: what is learned and chosen, and that a cancel leaves nothing behind."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core import Kind, Plan, RunStart, Timeline
from comfyui_duca.cache_core.calibration.calibration import ORIGINS, Calibration
from comfyui_duca.cache_core.calibration.sidecar import About
from comfyui_duca.cache_core.calibration.statistics import ForecastModel
from comfyui_duca.cache_core.calibration.use import origin_plan, predictor_of, search_for
from comfyui_duca.cache_core.engine.linear_sites import FactorisedLayers
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.planning.policies import AlwaysCompute, FrontLoaded, Given
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.cache_core.tuning import Calibrator, Wishes, calibrate, trials
from comfyui_duca.cache_core.tuning.tape import TapedRun
from comfyui_duca.cache_core.tuning.trials import psnr
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.sidecars import fingerprint_of
from helpers.calibrations import random_forecast
from helpers.sampling import cached, kinds, last_report, linear_sites_of
from helpers.tuner import QUICK, STEPS, calibrator, drawn, sampler_of, taped


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


@pytest.fixture(scope="module")
def small():
    """Returns the model with two of its nine blocks, for tests in which the picture does not matter."""
    model = load_demo_model()
    network = model.model.diffusion_model
    del network.double_blocks[1:], network.single_blocks[1:]
    return model


@pytest.fixture(scope="module")
def learned(model):
    """Returns what was learned from both prompts, and the progress that a user would see."""
    stages = []
    result = calibrator(model, on_progress=lambda *stage: stages.append(stage)).run()
    return SimpleNamespace(**result._asdict(), stages=stages)


# -- what is learned ----------------------------------------------------------------------------------------------------------


def test_what_was_learned_is_of_the_run(model, learned):
    forecast, timeline = learned.forecast, taped(model, Strategy())[1]._timeline
    assert learned.steps == STEPS and learned.factors is None
    assert forecast.step_times == timeline.times[:-1] and learned.times == forecast.model.times == timeline.times[:-1]
    assert forecast.model.gram.shape == (6, 6) and forecast.model.uz.shape == (6, 6, 48, 32) and forecast.model.basis.shape == (256, 32)
    assert [tried.plan.count(Kind.FULL) for tried in forecast.tried] == [4, 2]  # of six steps, at 1.5x and 2.5x
    stages = [stage for stage, _, _ in learned.stages]
    assert list(dict.fromkeys(stages)) == ["recording", "measuring sensitivity", "trying out"]
    assert all(0 <= done <= total for _, done, total in learned.stages)


def test_statistics_are_those_of_what_was_recorded(model, learned):
    """That is, the products that docs/method.md names, of all tokens of both conds of both prompts, in float64."""
    recording = Strategy(AlwaysCompute(), predictor_of(learned.forecast.model, 1.0))
    found = []
    for prompt in range(2):
        runs = []

        def make(start, runs=runs):
            runs.append(TapedRun(recording, start))
            return runs[-1]

        sampler_of(model)(prompt, make)
        found += runs[0].tape.trajectories()
    u, z = (torch.cat(parts, 1).double() for parts in zip(*found))
    kept = learned.forecast.model
    torch.testing.assert_close(kept.gram, torch.einsum("atc,btc->ab", z, z) / u.shape[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(kept.uu.double(), torch.einsum("atd,bte->abde", u, u) / u.shape[1], rtol=1e-4, atol=1e-6)
    uz = torch.einsum("atd,btc->abdc", u, z) / u.shape[1] @ kept.basis.double()
    torch.testing.assert_close(kept.uz.double(), uz, rtol=1e-4, atol=1e-5 * float(uz.abs().max()))


def spans(times) -> np.ndarray:
    return np.append(np.subtract(times[:-1], times[1:]), times[-1])


@pytest.mark.parametrize("nodes", [32, 4])
def test_sensitivity_is_the_effect_of_one_forecast_evaluation(model, monkeypatch, nodes):
    """It is the squared change of the final latent per squared error that is expected of the forecast. Steps 1, 4 and 5 are measured. The
    values per square of the time that a step lasts are interpolated, also if statistics are kept of fewer evaluations.
    """
    monkeypatch.setattr(calibrate, "_NODES", nodes)
    monkeypatch.setattr(calibrate.Trials, "best", lambda *_: None)  # saves time
    forecast = calibrator(model, prompts=[1]).run().forecast
    times, reference = forecast.step_times, drawn(model, 1)
    measured = []
    for step in (1, 4, 5):
        plan = Plan(tuple(Kind.SKIPPED if other == step else Kind.FULL for other in range(STEPS)))
        change = drawn(host.attach(model, Strategy(Given(plan), AUTO)), 1) - reference
        seen = times[max(0, step - 5) : step]
        missed = forecast.model.fit(seen, times[step], AUTO.weights(seen, times[step])).plain_error
        measured.append(float(change.double().square().mean()) / missed)
    at, per_time = [times[step] for step in (5, 4, 1)], np.log(np.divide(measured, spans(times)[[1, 4, 5]] ** 2))[::-1]
    kept = forecast.model.times
    assert kept == (times if nodes == 32 else tuple(times[step] for step in (0, 2, 3, 5)))
    expected = np.exp(np.interp(kept, at, per_time)) * spans(kept) ** 2
    assert forecast.model.sensitivity.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    if nodes == 32:
        assert [forecast.model.sensitivities(times)[step] for step in (1, 4, 5)] == pytest.approx(measured, rel=1e-3)


def test_both_halves_of_the_prompts_count(model, learned, monkeypatch):
    """Statistics are averaged, and of sensitivities the geometric mean is taken."""
    monkeypatch.setattr(calibrate.Trials, "best", lambda *_: None)
    halves = [calibrator(model, prompts=[prompt]).run().forecast.model for prompt in range(2)]
    whole = learned.forecast.model
    torch.testing.assert_close(whole.gram, (halves[0].gram + halves[1].gram) / 2)
    torch.testing.assert_close(whole.sensitivity, (halves[0].sensitivity * halves[1].sensitivity).sqrt())


@pytest.mark.parametrize("sure_by", [0.0, 2.0])
def test_choices_are_made_on_prompts_that_taught_nothing(model, monkeypatch, sure_by):
    """Every candidate is computed again here: learned from one prompt in a separate calibration, and sampled on the other."""
    worth = 0.5 if sure_by else 0.0
    monkeypatch.setattr(trials, "_SURE", sure_by)
    monkeypatch.setattr(trials, "_WORTH", worth)
    learned = calibrator(model).run()
    references = [drawn(model, prompt) for prompt in range(2)]
    others = [calibrator(model, prompts=[1 - prompt]).run().forecast for prompt in range(2)]

    def distances(plans: list[Plan], share: float | None) -> np.ndarray:
        found = []
        for prompt, (other, plan) in enumerate(zip(others, plans)):
            patched = host.attach(model, Strategy(Given(plan), predictor_of(other.model, share), corrects=True))
            found.append(psnr(drawn(patched, prompt), references[prompt]))
        return np.array(found)

    def searched(model, start: str, full: int) -> Plan:
        return search_for(model, learned.forecast.step_times, range(STEPS), True).plan(origin_plan(start, STEPS, range(STEPS), full))

    for tried in learned.forecast.tried:
        full = tried.plan.count(Kind.FULL)
        plans = {"": [FrontLoaded(STEPS / full).plan(STEPS, range(STEPS))] * 2}
        plans |= {start: [searched(other.model, start, full) for other in others] for start in ORIGINS}
        found = {(start, None): distances(pair, None) for start, pair in plans.items()}
        plain = found["", None]
        assert tried.uncalibrated == pytest.approx(plain.mean(), abs=1e-3)
        best = max(plans, key=lambda start: round(found[start, None].mean(), 3))
        found[best, 0.5] = distances(plans[best], 0.5)
        gains = {trial: result - plain for trial, result in found.items()}
        sure = [t for t, gain in gains.items() if gain.mean() > max(worth, sure_by * gain.std(ddof=1) / 2**0.5)]
        start, share = max([("", None), *sure], key=lambda trial: round(found[trial].mean(), 3))
        assert tried.psnr == pytest.approx(found[start, share].mean(), abs=1e-3) and tried.share == share
        assert plans[tried.searched_from] == plans[start]
        whole = learned.forecast.model
        assert tried.plan == (searched(whole, tried.searched_from, full) if tried.searched_from else plans[""][0])


SEEDS = (0, 5, 10)


def half(start: str) -> tuple[str, float]:
    return (start, 0.5)


PLAIN, FRONT, EVEN = ("", None), ("general", None), ("even gaps", None)


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ({FRONT: [1.0, 0.8, 1.2, 1.0], EVEN: [0.2] * 4, half("general"): [0.9, 0.7, 1.1, 0.9]}, FRONT),
        ({FRONT: [1.0, 0.8, 1.2, 1.0], EVEN: [1.4, 1.5, 1.5, 1.4], half("even gaps"): [1.0] * 4}, EVEN),
        ({FRONT: [1.0, 0.8, 1.2, 1.0], EVEN: [0.2] * 4, half("general"): [2.0, 2.1, 1.9, 2.0]}, half("general")),
        ({FRONT: [0.3] * 4, EVEN: [0.2] * 4, half("general"): [0.8, 0.7, 0.8, 0.7]}, half("general")),
        ({FRONT: [5.0, -3.0, 4.0, -2.0], EVEN: [0.0] * 4, half("general"): [0.0] * 4}, PLAIN),  # 1 dB on average, standard error 2
        ({FRONT: [5.0, -3.0, 4.0, -2.0], EVEN: [0.7, 0.8] * 2, half("general"): [0.0] * 4}, EVEN),
        ({FRONT: [-1.0] * 4, EVEN: [-0.1] * 4, half(""): [0.9, 0.8, 0.8, 0.9]}, half("")),
        ({FRONT: [0.6] * 4, EVEN: [0.2] * 4, half("general"): [4.0, 0.1, 4.0, 0.1]}, FRONT),  # more on average, but not surely
        ({FRONT: [0.4] * 4, EVEN: [0.3] * 4, half("general"): [0.3] * 4}, PLAIN),  # surely, but not worth it
    ],
)
def test_only_what_is_surely_better_is_chosen(gains, chosen):
    """The pictures are made up: each is that many dB nearer to its prompt's reference than the uncalibrated one is."""
    generator = torch.Generator().manual_seed(0)
    references = [torch.randn(1, 3, 8, 8, generator=generator) for _ in range(4)]
    noise = torch.randn(1, 3, 8, 8, generator=generator)
    halves, whole = [random_forecast(seed, 12).model for seed in SEEDS[:2]], random_forecast(SEEDS[2], 12).model
    timeline = Timeline(np.linspace(1, 0, 13).tolist())
    run_start = RunStart(torch.nn.Module(), FLUX, timeline, range(12), is_euler=True)

    def searched(model: ForecastModel, start: str) -> Plan:
        return search_for(model, timeline.times[:-1], range(12), True).plan(origin_plan(start, 12, range(12), 4))

    plans = {"": [FrontLoaded(3.0).plan(12, range(12))] * 3}
    plans |= {start: [searched(model, start) for model in (*halves, whole)] for start in ORIGINS}
    assert all(len({str(found[part]) for found in plans.values()}) == 3 for part in range(3)), "seeds that tell all plans apart"
    met = []

    def sampled(prompt, make):
        strategy = make(run_start)._strategy
        share, plan = getattr(strategy.predictor, "share", None), strategy.policy.plan(12, range(12))
        if share is not None:
            assert strategy.predictor.statistics is halves[1 - prompt % 2]
        (start,) = (start for start, found in plans.items() if found[1 - prompt % 2] == plan)
        assert strategy.corrects
        met.append((start, share))
        gain = gains[met[-1]][prompt] if met[-1] != PLAIN else 0.0
        return references[prompt] + noise * 0.1 * 10 ** (-gain / 20)

    tried = trials.Trials(halves, whole, run_start, sampled, references).best(4)
    assert (tried.searched_from, tried.share) == chosen and tried.plan == plans[chosen[0]][2]
    assert set(met) == {PLAIN, *gains}, "calibrated weights are tried on the best plan alone"
    assert tried.psnr - tried.uncalibrated == pytest.approx(np.mean(gains[chosen]) if chosen != PLAIN else 0.0, abs=1e-3)


def test_searched_plans_are_not_tried_where_nothing_is_corrected():
    """The sampler is not Euler's."""
    halves, timeline = [random_forecast(seed, 12).model for seed in SEEDS[:2]], Timeline(np.linspace(1, 0, 13).tolist())
    run_start, met = RunStart(torch.nn.Module(), FLUX, timeline, range(12)), set()

    def sampled(prompt, make):
        met.add(str(make(run_start)._strategy.policy.plan(12, range(12))))
        return torch.ones(1)

    tried = trials.Trials(halves, halves[0], run_start, sampled, [torch.zeros(1)] * 2).best(4)
    assert met == {str(FrontLoaded(3.0).plan(12, range(12)))} and not tried.searched_from


def test_a_calibration_brings_its_choices_to_a_run(model, learned):
    about = About("flux", "m", "euler", "simple", STEPS, 2.5, (1.0,) * 7, learned.times, (24, 24), 2, (100, 101), 0, "", {}, "2026-01-02")
    for tried, speedup in zip(learned.forecast.tried, QUICK.speedups):
        patched = cached(model, speedup=speedup, calibration=Calibration(about, fingerprint_of(model), learned.forecast))
        latent, predictor = drawn(patched, 0), predictor_of(learned.forecast.model, tried.share)
        strategy = Strategy(Given(tried.plan), predictor, corrects=True)
        assert kinds(last_report(patched)) == str(tried.plan)
        assert torch.equal(latent, drawn(host.attach(model, strategy), 0))


def test_two_evaluations_a_step_are_calibrated_as_one(model):
    """The history keeps Heun's second evaluation at a noise level. If a time were there twice, its step would last no time."""
    result = calibrator(model, Wishes(speedups=(2.0,), directions=16), sampler="heun", steps=4).run()
    model_, times = result.forecast.model, result.forecast.step_times
    assert result.times == times and len(times) == 4
    assert model_.sensitivities(times) == pytest.approx(model_.sensitivity.tolist())


def test_nothing_is_skipped_outside_the_window(small):
    """If the user lets only a part of the sampling skip, only that part is tried."""
    sampled = sampler_of(small)

    def windowed(prompt, make):
        return sampled(prompt, lambda start: make(start._replace(window=range(2, 5))))

    result = Calibrator(windowed, 2, Wishes(speedups=(1.5,), directions=16)).run()
    (tried,) = result.forecast.tried
    plan = str(tried.plan)
    assert plan.count("F") == 4 and plan[:2] + plan[5:] == "FFF"


def assert_bound(model, factors):
    """Asserts that every layer of the model has factors, with each part's share of its square norm."""
    sites = linear_sites_of(model.model.diffusion_model)
    assert FactorisedLayers.bind(sites, factors.tensors).sites == tuple(sites)
    assert all(tensor.dtype is torch.float16 for tensor in factors.tensors.values())
    assert {name.rpartition(".")[0] for name in factors.tensors} == factors.energy.keys()
    assert all(0 < share < 1 for share in factors.energy.values())


@pytest.mark.parametrize("method", ["svd", "ca_svd"])
def test_factors_are_those_of_the_models_layers(small, method):
    result = calibrator(small, Wishes(forecast=False, method=method, rank=4), steps=1).run()
    assert result.forecast is None and result.steps == 1
    assert_bound(small, result.factors)


# -- what cannot be calibrated ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [{"steps": [6, 5]}, {"scheduler": ["simple", "beta"]}], ids=str)
def test_prompts_with_different_noise_levels_are_refused(small, more):
    with pytest.raises(ValueError, match="different noise levels"):
        calibrator(small, **more).run()


def test_a_run_with_nothing_to_skip_is_refused(small):
    with pytest.raises(ValueError, match="1 steps are too few to skip any"):
        calibrator(small, steps=1).run()


def test_a_sampler_that_goes_back_is_refused(small):
    """heunpp2 looks two noise levels ahead and then returns, which no forecast can follow."""
    with pytest.raises(ValueError, match="goes back"):
        calibrator(small, sampler="heunpp2").run()


def test_a_node_that_answers_for_the_model_is_noticed(small):
    """Caches of other packs do so in some evaluations. What was kept before must not be taken for these."""
    from comfy.patcher_extension import WrappersMP

    levels = []

    def answers(executor, x, timestep, *args, **kwargs):
        if float(timestep[0]) not in levels:
            levels.append(float(timestep[0]))
        return torch.zeros_like(x) if len(levels) == 4 else executor(x, timestep, *args, **kwargs)

    patched = small.clone()
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", answers)
    with pytest.raises(ValueError, match="could not be recorded"):
        calibrator(patched).run()
    assert len(levels) == STEPS  # of the first prompt alone


# -- what is left unchanged ------------------------------------------------------------------------------------------------------


def stopping(count: int):
    """Returns a function that raises, as the user's cancel does, in its `count`-th call."""
    calls = []

    def stop(*_args):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt

    return stop


def state_of(model) -> tuple:
    """Returns what a calibration must leave unchanged: every forward, hook, weight and wrapper."""
    network = model.model.diffusion_model
    forwards = [module.__dict__.get("forward") for module in network.modules()]
    hooks = [(len(module._forward_hooks), len(module._forward_pre_hooks)) for module in network.modules()]
    return forwards, hooks, [id(weight) for weight in network.parameters()], repr(model.wrappers), repr(model.model_options)


BRIEF = Wishes(method="cd_svd", rank=4, speedups=(2.0,), directions=16)


@pytest.mark.parametrize(
    "moment",
    ["recording", "sensitivity", "plans", "layers", "between evaluations", "inside a block", "while measuring"],
)
def test_a_cancel_leaves_nothing_behind(small, moment):
    plain, before = drawn(small, 0, steps=4), state_of(small)
    stages = {
        "recording": ("recording", 1),
        "sensitivity": ("measuring sensitivity", 3),
        "plans": ("trying out", 2),
        "layers": ("factorising layers", 7),
    }
    more, on_progress, hook, wishes = {}, lambda *_: None, None, BRIEF
    if moment in stages:
        on_progress = lambda stage, done, _total: stop_at(stages[moment], stage, done)  # noqa: E731
        wishes = replace(BRIEF, forecast=moment != "layers")
    elif moment == "between evaluations":
        more = {"callback": stopping(3)}
    else:
        block = small.model.diffusion_model.single_blocks[0]
        hook = block.linear1.register_forward_hook(stopping(3 if moment == "while measuring" else 11))
    with pytest.raises(KeyboardInterrupt):
        calibrator(small, wishes, on_progress, steps=4, **more).run()
    if hook is not None:
        hook.remove()
    assert state_of(small) == before
    assert torch.equal(drawn(small, 0, steps=4), plain)


def stop_at(moment: tuple[str, int], stage: str, done: int) -> None:
    if (stage, done) == moment:
        raise KeyboardInterrupt


def test_a_finished_calibration_leaves_nothing_behind(small):
    plain, before = drawn(small, 0, steps=4), state_of(small)
    result = calibrator(small, BRIEF, steps=4).run()
    assert result.forecast is not None
    assert_bound(small, result.factors)
    assert state_of(small) == before and torch.equal(drawn(small, 0, steps=4), plain)

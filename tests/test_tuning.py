"""Calibration on the real host: what is learned and chosen, and what a cancel leaves behind."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core import Kind, Opening, Plan, Timeline
from comfyui_duca.cache_core.calibration.calibration import Calibration
from comfyui_duca.cache_core.calibration.sidecar import About
from comfyui_duca.cache_core.calibration.statistics import ForecastModel
from comfyui_duca.cache_core.calibration.use import predictor_of, search_for
from comfyui_duca.cache_core.engine.linear_sites import CalibratedLinears
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.policies import AlwaysCompute, FrontLoaded, Given
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.cache_core.tuning import Calibrator, Wishes, calibrate, trials
from comfyui_duca.cache_core.tuning.tape import TapedRun
from comfyui_duca.cache_core.tuning.trials import psnr
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.sidecars import fingerprint_of
from host import cached, kinds, last_report
from test_cache_schedule import random_forecast
from tuner import QUICK, STEPS, calibrator, drawn, sampler_of, taped


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


@pytest.fixture(scope="module")
def small():
    """The same with two of its nine blocks, where it does not matter what is drawn."""
    model = load_demo_model()
    network = model.model.diffusion_model
    del network.double_blocks[1:], network.single_blocks[1:]
    return model


@pytest.fixture(scope="module")
def learned(model):
    """Of both prompts, with what a user would be told."""
    told = []
    result = calibrator(model, told=lambda *stage: told.append(stage)).run()
    return SimpleNamespace(**result._asdict(), told=told)


# -- what is learned ----------------------------------------------------------------------------------------------------------


def test_what_was_learned_is_of_the_run(model, learned):
    forecast, timeline = learned.forecast, taped(model, Strategy())[1]._timeline
    assert learned.steps == STEPS and learned.factors is None
    assert forecast.step_times == timeline.times[:-1] and learned.times == forecast.model.times == timeline.times[:-1]
    assert forecast.model.gram.shape == (6, 6) and forecast.model.uz.shape == (6, 6, 48, 32) and forecast.model.basis.shape == (256, 32)
    assert [choice.plan.count(Kind.FULL) for choice in forecast.choices] == [4, 2]  # of six steps, at 1.5 and 2.5
    stages = [stage for stage, _, _ in learned.told]
    assert list(dict.fromkeys(stages)) == ["recording", "measuring sensitivity", "trying out"]
    assert all(0 <= done <= total for _, done, total in learned.told)


def test_statistics_are_those_of_what_was_recorded(model, learned):
    """The products that the method names, of all tokens of both conds of both prompts, in float64."""
    recording = Strategy(AlwaysCompute(), predictor_of(learned.forecast.model, 1.0))
    found = []
    for prompt in range(2):
        runs = []

        def make(opening, runs=runs):
            runs.append(TapedRun(recording, opening))
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
def test_sensitivity_is_the_harm_of_one_forecast_evaluation(model, monkeypatch, nodes):
    """Squared change of the final latent per squared error expected of the forecast. Steps 1, 4 and 5 are measured; what they give
    per square of the time that a step lasts is interpolated, also where statistics are kept of fewer evaluations."""
    monkeypatch.setattr(calibrate, "_NODES", nodes)
    monkeypatch.setattr(calibrate.Trials, "choose", lambda *_: None)  # to save time
    forecast = calibrator(model, prompts=[1]).run().forecast
    times, reference = forecast.step_times, drawn(model, 1)
    harms = []
    for step in (1, 4, 5):
        plan = Plan(tuple(Kind.AGGRESSIVE if other == step else Kind.FULL for other in range(STEPS)))
        change = drawn(cached(model, chosen=Strategy(Given(plan), AUTO)), 1) - reference
        seen = times[max(0, step - 5) : step]
        missed = forecast.model.fit(seen, times[step], AUTO.weights(seen, times[step])).plain_error
        harms.append(float(change.double().square().mean()) / missed)
    at, per_time = [times[step] for step in (5, 4, 1)], np.log(np.divide(harms, spans(times)[[1, 4, 5]] ** 2))[::-1]
    kept = forecast.model.times
    assert kept == (times if nodes == 32 else tuple(times[step] for step in (0, 2, 3, 5)))
    expected = np.exp(np.interp(kept, at, per_time)) * spans(kept) ** 2
    assert forecast.model.sensitivity.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    if nodes == 32:
        assert [forecast.model.harm(times)[step] for step in (1, 4, 5)] == pytest.approx(harms, rel=1e-3)


def test_both_halves_of_the_prompts_count(model, learned, monkeypatch):
    """Statistics add up, of sensitivities it is the geometric mean."""
    monkeypatch.setattr(calibrate.Trials, "choose", lambda *_: None)
    halves = [calibrator(model, prompts=[prompt]).run().forecast.model for prompt in range(2)]
    whole = learned.forecast.model
    torch.testing.assert_close(whole.gram, (halves[0].gram + halves[1].gram) / 2)
    torch.testing.assert_close(whole.sensitivity, (halves[0].sensitivity * halves[1].sensitivity).sqrt())


@pytest.mark.parametrize("sure", [0.0, 2.0])
def test_choices_are_made_on_prompts_that_taught_nothing(model, monkeypatch, sure):
    """Every candidate is met again here: learned from one prompt by a calibration of its own, sampled on the other."""
    worth = 0.5 if sure else 0.0
    monkeypatch.setattr(trials, "_SURE", sure)
    monkeypatch.setattr(trials, "_WORTH", worth)
    learned = calibrator(model).run()
    references = [drawn(model, prompt) for prompt in range(2)]
    others = [calibrator(model, prompts=[1 - prompt]).run().forecast for prompt in range(2)]

    def distances(plans: list[Plan], share: float | None) -> np.ndarray:
        found = []
        for prompt, (other, plan) in enumerate(zip(others, plans)):
            patched = cached(model, chosen=Strategy(Given(plan), predictor_of(other.model, share), corrects=True))
            found.append(psnr(drawn(patched, prompt), references[prompt]))
        return np.array(found)

    def searched(model, general: Plan) -> Plan:
        return search_for(model, learned.forecast.step_times, range(STEPS), True).plan(general)

    for choice in learned.forecast.choices:
        general = FrontLoaded(STEPS / choice.plan.count(Kind.FULL)).plan(STEPS, range(STEPS))
        plain = distances([general] * 2, None)
        assert choice.uncalibrated == pytest.approx(plain.mean(), abs=1e-3)
        plans = [searched(other.model, general) for other in others]
        candidates = [(plans, None), (plans, 0.5), ([general] * 2, 0.5)] if plans != [general] * 2 else [([general] * 2, 0.5)]
        expected, best = plain, ([general] * 2, None)
        for candidate in candidates:
            if candidate[0] == [general] * 2 and best[0] == plans != [general] * 2:
                continue  # calibrated weights have been tried on the better plan
            found = distances(*candidate)
            surely = (found - plain).mean() > max(worth, sure * (found - plain).std(ddof=1) / 2**0.5)
            if surely and found.mean() > expected.mean():
                expected, best = found, candidate
        assert choice.psnr == pytest.approx(expected.mean(), abs=1e-3) and choice.share == best[1]
        assert choice.is_searched == (best[0] == plans != [general] * 2)
        assert choice.plan == (searched(learned.forecast.model, general) if choice.is_searched else general)


def minding(step: int) -> ForecastModel:
    """Made-up statistics by which everything hangs on one step."""
    return replace(random_forecast(step, 6).model, sensitivity=torch.tensor([1e4 if other == step else 1.0 for other in range(6)]).double())


GENERAL, SEARCHED, HALF, BOTH = (False, None), (True, None), (False, 0.5), (True, 0.5)


@pytest.mark.parametrize(
    ("gains", "chosen"),
    [
        ({SEARCHED: [1.0, 0.8, 1.2, 1.0], BOTH: [0.9, 0.7, 1.1, 0.9]}, SEARCHED),
        ({SEARCHED: [1.0, 0.8, 1.2, 1.0], BOTH: [2.0, 2.1, 1.9, 2.0]}, BOTH),
        ({SEARCHED: [0.3, 0.3, 0.3, 0.3], BOTH: [0.8, 0.7, 0.8, 0.7]}, BOTH),
        ({SEARCHED: [5.0, -3.0, 4.0, -2.0], BOTH: [0.0] * 4, HALF: [0.0] * 4}, GENERAL),  # 1 dB on average, with a standard error of 2
        ({SEARCHED: [-1.0, -1.0, -1.0, -1.0], BOTH: [0.1, 0.1, 0.1, 0.1], HALF: [0.9, 0.8, 0.8, 0.9]}, HALF),
        ({SEARCHED: [0.6, 0.6, 0.6, 0.6], BOTH: [4.0, 0.1, 4.0, 0.1]}, SEARCHED),  # more on average, but not surely
        ({SEARCHED: [0.4, 0.4, 0.4, 0.4], BOTH: [0.3, 0.3, 0.3, 0.3], HALF: [0.4, 0.4, 0.4, 0.4]}, GENERAL),  # surely, but not worth it
    ],
)
def test_only_what_is_surely_better_is_chosen(gains, chosen):
    """Made-up pictures, each prompt's as many dB nearer to its reference than the uncalibrated one's."""
    generator = torch.Generator().manual_seed(0)
    references = [torch.randn(1, 3, 8, 8, generator=generator) for _ in range(4)]
    noise = torch.randn(1, 3, 8, 8, generator=generator)
    *halves, whole = (minding(step) for step in (1, 3, 5))
    timeline = Timeline(np.linspace(1, 0, 7).tolist())
    begun = Opening(torch.nn.Module(), FLUX, timeline, range(6), torch.device("cpu"), is_euler=True)
    general = FrontLoaded(2.0).plan(6, range(6))
    searched = [search_for(model, timeline.times[:-1], range(6), True).plan(general) for model in (*halves, whole)]
    assert all(plan != general and plan[step] is Kind.FULL for plan, step in zip(searched, (1, 3, 5)))
    met = []

    def sampled(prompt, make):
        strategy = make(begun)._strategy
        share, plan = getattr(strategy.predictor, "share", None), strategy.policy.plan(6, range(6))
        if share is not None:
            assert strategy.predictor.statistics is halves[1 - prompt % 2]
        assert strategy.corrects and plan in (general, searched[1 - prompt % 2])
        met.append((plan != general, share))
        gain = gains[met[-1]][prompt] if met[-1] != GENERAL else 0.0
        return references[prompt] + noise * 0.1 * 10 ** (-gain / 20)

    choice = trials.Trials(halves, whole, begun, sampled, references).choose(3)
    assert (choice.is_searched, choice.share) == chosen
    assert choice.plan == (searched[2] if choice.is_searched else general)
    assert set(met) == {GENERAL, *gains}, "calibrated weights are tried on the better plan alone"
    assert choice.psnr - choice.uncalibrated == pytest.approx(np.mean(gains[chosen]) if chosen != GENERAL else 0.0, abs=1e-3)


def test_searched_plans_are_not_tried_where_nothing_is_corrected():
    """On a sampler other than Euler's."""
    halves, timeline = [minding(step) for step in (1, 3)], Timeline(np.linspace(1, 0, 7).tolist())
    begun, met = Opening(torch.nn.Module(), FLUX, timeline, range(6), torch.device("cpu")), set()

    def sampled(prompt, make):
        met.add(str(make(begun)._strategy.policy.plan(6, range(6))))
        return torch.ones(1)

    choice = trials.Trials(halves, halves[0], begun, sampled, [torch.zeros(1)] * 2).choose(3)
    assert met == {str(FrontLoaded(2.0).plan(6, range(6)))} and not choice.is_searched


def test_a_calibration_brings_its_choices_to_a_run(model, learned):
    about = About("flux", "m", "euler", "simple", STEPS, 2.5, (1.0,) * 7, learned.times, (24, 24), 2, (100, 101), 0, "", {}, "2026-01-02")
    for choice, speedup in zip(learned.forecast.choices, QUICK.speedups):
        patched = cached(model, speedup=speedup, calibration=Calibration(about, fingerprint_of(model), learned.forecast))
        latent, predictor = drawn(patched, 0), predictor_of(learned.forecast.model, choice.share)
        strategy = Strategy(Given(choice.plan), predictor, corrects=True)
        assert kinds(last_report(patched)) == str(choice.plan)
        assert torch.equal(latent, drawn(cached(model, chosen=strategy), 0))


def test_two_evaluations_a_step_are_calibrated_as_one(model):
    """Heun's second evaluation at a noise level is what history keeps; a time that stood there twice would last no time at all."""
    result = calibrator(model, Wishes(speedups=(2.0,), directions=16), sampler="heun", steps=4).run()
    model_, times = result.forecast.model, result.forecast.step_times
    assert result.times == times and len(times) == 4
    assert model_.harm(times) == pytest.approx(model_.sensitivity.tolist())


def test_nothing_is_skipped_outside_the_window(small):
    """Where the user lets only a part of sampling skip, only that is tried out."""
    network, sampled = small.model.diffusion_model, sampler_of(small)

    def windowed(prompt, make):
        return sampled(prompt, lambda opening: make(opening._replace(window=range(2, 5))))

    result = Calibrator(FLUX, network, windowed, 2, Wishes(speedups=(1.5,), directions=16)).run()
    (choice,) = result.forecast.choices
    plan = str(choice.plan)
    assert plan.count("F") == 4 and plan[:2] + plan[5:] == "FFF"


def assert_bound(model, factors):
    """To every layer of the model, with each part's share of its square norm."""
    assert CalibratedLinears.bind(FLUX, model.model.diffusion_model, factors.tensors).sites
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
def test_prompts_with_different_schedules_are_refused(small, more):
    with pytest.raises(ValueError, match="different noise levels"):
        calibrator(small, **more).run()


def test_a_run_with_nothing_to_skip_is_refused(small):
    with pytest.raises(ValueError, match="1 steps there is nothing to skip"):
        calibrator(small, steps=1).run()


def test_a_sampler_that_goes_back_is_refused(small):
    """heunpp2 looks two noise levels ahead and then returns: no forecast is made of that."""
    with pytest.raises(ValueError, match="goes back"):
        calibrator(small, sampler="heunpp2").run()


def test_a_node_that_answers_for_the_model_is_noticed(small):
    """As caches of other packs do in some evaluations: what was kept before must not pass for these."""
    from comfy.patcher_extension import WrappersMP

    calls = []

    def answers(executor, x, *args, **kwargs):
        calls.append(1)
        return torch.zeros_like(x) if len(calls) % STEPS == 4 else executor(x, *args, **kwargs)

    patched = small.clone()
    patched.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "test", answers)
    with pytest.raises(ValueError, match="could not be recorded"):
        calibrator(patched).run()
    assert len(calls) == STEPS


# -- what is left behind ------------------------------------------------------------------------------------------------------


def stopping(count: int):
    """Raises as the user's cancel does, when called for the `count`-th time."""
    calls = []

    def stop(*_args):
        calls.append(1)
        if len(calls) == count:
            raise KeyboardInterrupt

    return stop


def state_of(model) -> tuple:
    """What a calibration must leave as it is: every forward, hook, weight and wrapper."""
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
    more, told, hook, wishes = {}, lambda *_: None, None, BRIEF
    if moment in stages:
        told = lambda stage, done, _total: stop_at(stages[moment], stage, done)  # noqa: E731
        wishes = replace(BRIEF, forecast=moment != "layers")
    elif moment == "between evaluations":
        more = {"callback": stopping(3)}
    else:
        block = small.model.diffusion_model.single_blocks[0]
        hook = block.linear1.register_forward_hook(stopping(3 if moment == "while measuring" else 11))
    with pytest.raises(KeyboardInterrupt):
        calibrator(small, wishes, told, steps=4, **more).run()
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

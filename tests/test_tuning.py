"""Calibration on the real host: what is recorded and played back, what is chosen, and what a cancel leaves behind."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import comfy.model_management
import numpy as np
import pytest
import torch
from comfyui_duca.cache_core import Kind, Plan, find_family
from comfyui_duca.cache_core.calibration.calibration import Calibration
from comfyui_duca.cache_core.calibration.sidecar import About
from comfyui_duca.cache_core.calibration.use import predictor_of
from comfyui_duca.cache_core.engine.linear_sites import CalibratedLinears
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.policies import AlwaysCompute, Given
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.cache_core.tuning import Calibrator, Wishes, calibrate
from comfyui_duca.cache_core.tuning.tape import TapedRun
from comfyui_duca.cache_core.tuning.trials import psnr
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.sidecars import fingerprint_of
from host import cached, kinds, last_report, sample

STEPS = 6
PROMPTS = ("red apple", "castle")
QUICK = Wishes(tries=2, speedups=(1.5, 2.5), directions=32)


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


def drawn(model, prompt: int, **more) -> torch.Tensor:
    """What every run of a prompt begins with, so that all end alike."""
    return sample(model, **{"prompt": PROMPTS[prompt], "seed": 100 + prompt, "steps": STEPS, "size": (24, 24), **more})


def sampler_of(model, **more):
    """What a Calibrator is given. more: of `sample`; a list has one for each prompt."""

    def sampled(prompt, make):
        clone = model.clone()
        host.listen(clone, lambda patcher, sigmas: make(host.opening(patcher, sigmas)), lambda run, result: run.close(result is not None))
        return drawn(clone, prompt, **{name: value[prompt] if isinstance(value, list) else value for name, value in more.items()})

    return sampled


def calibrator(model, wishes=QUICK, told=lambda *_: None, **more) -> Calibrator:
    network = model.model.diffusion_model
    return Calibrator(find_family(network), network, sampler_of(model, **more), len(PROMPTS), wishes, told)


# -- tapes --------------------------------------------------------------------------------------------------------------------


def taped(model, strategy, before=None, until=0, **more):
    """The latent of the first prompt and its run."""
    runs = []

    def make(opening):
        runs.append(TapedRun(strategy, opening, before, until))
        return runs[-1]

    return sampler_of(model, **more)(0, make), runs[-1]


@pytest.fixture
def computed(model):
    """Grows with every evaluation in which the model's blocks run."""
    calls = []
    hook = model.model.diffusion_model.double_blocks[0].img_attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def forecast_strategy(text: str, learned=None, share=None) -> Strategy:
    return Strategy(Given(Plan.parse(text)), AUTO if learned is None else predictor_of(learned.forecast.model, share))


@pytest.fixture(scope="module")
def learned(model):
    """Of both prompts, with what a user would be told."""
    told = []
    result = calibrator(model, told=lambda *stage: told.append(stage)).run()
    return SimpleNamespace(**result._asdict(), told=told)


def test_recording_changes_nothing(model):
    plain = drawn(model, 0)
    latent, run = taped(model, Strategy(AlwaysCompute(), AUTO))
    assert torch.equal(latent, plain)
    assert run.store.bytes == 0 and len(run.tape.entries) == STEPS and all(len(entry) == 1 for entry in run.tape.entries)


@pytest.mark.parametrize("until", range(STEPS + 2))
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_played_back_beginning_changes_nothing(model, learned, computed, share, until):
    """From none to all, and more than there are: what is not played back is computed from what was."""
    strategy = forecast_strategy("FFaFaa", learned, share)
    latent, run = taped(model, strategy)
    assert len(computed) == 3 and kinds(run.report) == "FFaFaa"
    computed.clear()
    again, replay = taped(model, strategy, run.tape, until)
    assert torch.equal(again, latent) and len(computed) == "FFaFaa"[until:].count("F")
    assert replay.tape.times == run.tape.times and len(replay.tape.entries) == STEPS
    for entries, before in zip(replay.tape.entries, run.tape.entries):  # so it can be played back itself
        assert torch.equal(entries[0].output, before[0].output) and len(entries[0].kept) == len(before[0].kept)
    third, _ = taped(model, strategy, replay.tape, STEPS - 1)
    assert torch.equal(third, latent)


def test_a_played_back_beginning_serves_another_plan(model, learned):
    """As a move of the fourth step is tried out: up to there nothing is computed again."""
    _, run = taped(model, forecast_strategy("FaFFaa", learned, 1.0))
    moved = forecast_strategy("FaFaFa", learned, 1.0)
    assert torch.equal(taped(model, moved, run.tape, 3)[0], taped(model, moved)[0])


def test_an_uncached_beginning_serves_a_forecast(model, learned):
    """As sensitivity is measured; the recorded run forecast nothing, and kept the input all the same."""
    _, run = taped(model, forecast_strategy("FFFFFF", learned, 1.0))
    one = forecast_strategy("FFFFaF", learned, 1.0)
    latent, replay = taped(model, one, run.tape, 4)
    assert kinds(replay.report)[4:] == "aF" and torch.equal(latent, taped(model, one)[0])
    assert not torch.equal(latent, drawn(model, 0))


@pytest.mark.parametrize("until", [0, 4, 5, 11])
def test_two_evaluations_a_step_are_played_back(model, learned, computed, until):
    """Heun evaluates twice at every noise level but the first: eleven times in six steps."""
    strategy = forecast_strategy("FFaFaa", learned, 1.0)
    latent, run = taped(model, strategy, sampler="heun")
    assert kinds(run.report) == "FFFaaFFaaaa" and len(run.tape.entries) == 11
    computed.clear()
    again, _ = taped(model, strategy, run.tape, until, sampler="heun")
    assert torch.equal(again, latent) and len(computed) == "FFFaaFFaaaa"[until:].count("F")


def test_conds_in_calls_of_their_own_are_played_back(model, learned, computed, monkeypatch):
    """As where memory is short."""
    monkeypatch.setattr(comfy.samplers.model_management, "get_free_memory", lambda *_a, **_k: 0)
    strategy = forecast_strategy("FaFFaa", learned, 1.0)
    latent, run = taped(model, strategy)
    assert [len(entry) for entry in run.tape.entries] == [2] * STEPS
    computed.clear()
    assert torch.equal(taped(model, strategy, run.tape, 3)[0], latent) and len(computed) == 2
    monkeypatch.undo()
    assert torch.allclose(taped(model, strategy, run.tape, 3)[0], latent, atol=1e-4), "memory is there again: both conds in one call"
    assert len(computed) == 2 + 3


def test_a_tape_holds_every_cond_computed_at_each_evaluation(model, learned):
    _, run = taped(model, forecast_strategy("FFFFFF", learned, 1.0))
    assert [(u.shape, z.shape) for u, z in run.tape.trajectories()] == [((6, 36, 48), (6, 36, 256))] * 2
    assert taped(model, forecast_strategy("FFFFFF"))[1].tape.trajectories() == []  # nothing kept the input
    assert taped(model, forecast_strategy("FFaFFF", learned, 1.0))[1].tape.trajectories() == []


# -- what is learned ----------------------------------------------------------------------------------------------------------


def test_what_was_learned_is_of_the_run(model, learned):
    forecast, timeline = learned.forecast, taped(model, Strategy())[1]._timeline
    assert learned.steps == STEPS and learned.factors is None
    assert forecast.step_times == timeline.times[:-1] and learned.times == forecast.model.times == timeline.times[:-1]
    assert forecast.model.gram.shape == (6, 6) and forecast.model.uz.shape == (6, 6, 48, 32) and forecast.model.basis.shape == (256, 32)
    assert [choice.plan.count(Kind.FULL) for choice in forecast.choices] == [4, 2]  # of six steps, at 1.5 and 2.5
    stages = [stage for stage, _, _ in learned.told]
    assert list(dict.fromkeys(stages)) == ["recording", "measuring sensitivity", "trying plans"]
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
    forecast = calibrator(model).run().forecast
    times, predictor = forecast.step_times, predictor_of(forecast.model, 1.0)
    references = [drawn(model, prompt) for prompt in range(2)]
    harms = []
    for step in (1, 4, 5):
        plan = Plan(tuple(Kind.AGGRESSIVE if other == step else Kind.FULL for other in range(STEPS)))
        images = [drawn(cached(model, chosen=Strategy(Given(plan), predictor)), prompt) for prompt in range(2)]
        change = sum(float((a - b).double().square().mean()) for a, b in zip(images, references)) / 2
        harms.append(change / predictor.fit(times[max(0, step - 5) : step], times[step]).error)
    at, per_time = [times[step] for step in (5, 4, 1)], np.log(np.divide(harms, spans(times)[[1, 4, 5]] ** 2))[::-1]
    kept = forecast.model.times
    assert kept == (times if nodes == 32 else tuple(times[step] for step in (0, 2, 3, 5)))
    expected = np.exp(np.interp(kept, at, per_time)) * spans(kept) ** 2
    assert forecast.model.sensitivity.tolist() == pytest.approx(expected.tolist(), rel=1e-3)
    if nodes == 32:
        assert [forecast.model.harm(times)[step] for step in (1, 4, 5)] == pytest.approx(harms, rel=1e-3)


def test_choices_are_what_they_say_and_never_worse_than_uncalibrated(model, learned):
    """The distances found with tapes are met again by sampling with the chosen strategy, and with the plain setting."""
    references = [drawn(model, prompt) for prompt in range(2)]

    def distance(patched) -> float:
        return sum(psnr(drawn(patched, prompt), references[prompt]) for prompt in range(2)) / 2

    better = 0
    for choice, speedup in zip(learned.forecast.choices, QUICK.speedups):
        strategy = Strategy(Given(choice.plan), predictor_of(learned.forecast.model, choice.share))
        chosen, plain = cached(model, chosen=strategy), cached(model, speedup=speedup)
        assert distance(chosen) == pytest.approx(choice.psnr, abs=1e-3)
        assert distance(plain) == pytest.approx(choice.uncalibrated, abs=1e-3)
        assert kinds(last_report(chosen)) == str(choice.plan) and last_report(plain).count(Kind.FULL) == choice.plan.count(Kind.FULL)
        assert choice.psnr >= choice.uncalibrated
        better += choice.psnr > choice.uncalibrated + 0.1
    assert better, "trying plans out should have been worth it for one budget"


def test_a_calibration_brings_its_choices_to_a_run(model, learned):
    about = About("flux", "m", "euler", "simple", STEPS, 2.5, (1.0,) * 7, learned.times, (24, 24), 2, (100, 101), 0, "", {}, "2026-01-02")
    for choice, speedup in zip(learned.forecast.choices, QUICK.speedups):
        patched = cached(model, speedup=speedup, calibration=Calibration(about, fingerprint_of(model), learned.forecast))
        latent, strategy = drawn(patched, 0), Strategy(Given(choice.plan), predictor_of(learned.forecast.model, choice.share))
        assert kinds(last_report(patched)) == str(choice.plan)
        assert torch.equal(latent, drawn(cached(model, chosen=strategy), 0))


def test_two_evaluations_a_step_are_calibrated_as_one(model):
    """Heun's second evaluation at a noise level is what history keeps; a time that stood there twice would last no time at all."""
    result = calibrator(model, Wishes(tries=1, speedups=(2.0,), directions=16), sampler="heun", steps=4).run()
    model_, times = result.forecast.model, result.forecast.step_times
    assert result.times == times and len(times) == 4
    assert model_.harm(times) == pytest.approx(model_.sensitivity.tolist())


def test_nothing_is_skipped_outside_the_window(small):
    """Where the user lets only a part of sampling skip, only that is tried out."""
    network, sampled = small.model.diffusion_model, sampler_of(small)

    def windowed(prompt, make):
        return sampled(prompt, lambda opening: make(opening._replace(window=range(2, 5))))

    result = Calibrator(FLUX, network, windowed, 2, Wishes(tries=2, speedups=(1.5,), directions=16)).run()
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


BRIEF = Wishes(method="cd_svd", rank=4, tries=1, speedups=(2.0,), directions=16)


@pytest.mark.parametrize(
    "moment",
    ["recording", "sensitivity", "plans", "layers", "between evaluations", "inside a block", "while measuring"],
)
def test_a_cancel_leaves_nothing_behind(small, moment):
    plain, before = drawn(small, 0, steps=4), state_of(small)
    stages = {
        "recording": ("recording", 1),
        "sensitivity": ("measuring sensitivity", 3),
        "plans": ("trying plans", 2),
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

"""Runs that are recorded and played back give the same latents, on the host."""

from __future__ import annotations

import pytest
import torch
from comfyui_duca.cache_core import Plan
from comfyui_duca.cache_core.calibration.use import predictor_of
from comfyui_duca.cache_core.planning.policies import AlwaysCompute, Given
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.cache_core.tuning import Wishes
from comfyui_duca.nodes.demo_flux import load_demo_model
from helpers.sampling import kinds, split_calls
from helpers.tuner import STEPS, calibrator, drawn, taped


@pytest.fixture
def computed(model):
    """Returns a list that grows with every evaluation in which the model's blocks run."""
    calls = []
    hook = model.model.diffusion_model.double_blocks[0].img_attn.qkv.register_forward_hook(lambda *_: calls.append(1))
    yield calls
    hook.remove()


def forecast_strategy(text: str, learned=None, share=None) -> Strategy:
    return Strategy(Given(Plan.parse(text)), AUTO if learned is None else predictor_of(learned.forecast.model, share))


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


@pytest.fixture(scope="module")
def learned(model):
    """Returns what was learned from both prompts."""
    return calibrator(model, Wishes(speedups=(2.0,), directions=32)).run()


def test_recording_changes_nothing(model):
    plain = drawn(model, 0)
    latent, run = taped(model, Strategy(AlwaysCompute(), AUTO))
    assert torch.equal(latent, plain)
    assert run.store.bytes == 0 and len(run.tape.entries) == STEPS and all(len(entry) == 1 for entry in run.tape.entries)


@pytest.mark.parametrize("until", range(STEPS + 2))
@pytest.mark.parametrize("share", [None, 0.5])
def test_a_played_back_beginning_changes_nothing(model, learned, computed, share, until):
    """From no step to all of them, and more than there are. Other steps are computed from what was played back."""
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
    """As when a move of the fourth step is tried: nothing before it is computed again."""
    _, run = taped(model, forecast_strategy("FaFFaa", learned, 1.0))
    moved = forecast_strategy("FaFaFa", learned, 1.0)
    assert torch.equal(taped(model, moved, run.tape, 3)[0], taped(model, moved)[0])


def test_an_uncached_beginning_serves_a_forecast(model, learned):
    """As when sensitivity is measured. The recorded run forecast nothing, but kept the input."""
    _, run = taped(model, forecast_strategy("FFFFFF", learned, 1.0))
    one = forecast_strategy("FFFFaF", learned, 1.0)
    latent, replay = taped(model, one, run.tape, 4)
    assert kinds(replay.report)[4:] == "aF" and torch.equal(latent, taped(model, one)[0])
    assert not torch.equal(latent, drawn(model, 0))


@pytest.mark.parametrize("until", [0, 4, 5, 11])
def test_two_evaluations_a_step_are_played_back(model, learned, computed, until):
    """Heun evaluates every noise level but the first twice: eleven times in six steps."""
    strategy = forecast_strategy("FFaFaa", learned, 1.0)
    latent, run = taped(model, strategy, sampler="heun")
    assert kinds(run.report) == "FFFaaFFaaaa" and len(run.tape.entries) == 11
    computed.clear()
    again, _ = taped(model, strategy, run.tape, until, sampler="heun")
    assert torch.equal(again, latent) and len(computed) == "FFFaaFFaaaa"[until:].count("F")


def test_conds_in_calls_of_their_own_are_played_back(model, learned, computed, monkeypatch):
    """As when memory is short."""
    split_calls(monkeypatch)
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
    assert taped(model, forecast_strategy("FFFFFF"))[1].tape.trajectories() == []  # the input was not kept
    assert taped(model, forecast_strategy("FFaFFF", learned, 1.0))[1].tape.trajectories() == []

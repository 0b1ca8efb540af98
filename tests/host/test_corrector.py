"""Full evaluations make up for what was skipped before them: by hand, and on the host's samplers."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
from comfyui_duca.cache_core import Kind, Plan, Settings, Timeline
from comfyui_duca.cache_core.corrector import Corrector
from comfyui_duca.cache_core.meter import Evaluation
from comfyui_duca.cache_core.policies import FrontLoaded, Given
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import load_demo_model
from host import cached, last_report, psnr, sample

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


def evaluation(step: int, plan: str, kind: Kind | None = None, calls: int = 1) -> Evaluation:
    planned = Plan.parse(plan)[step]
    kind = kind or planned
    return Evaluation(step, step, SIGMAS[step], planned, kind, calls, skipped=calls if kind is Kind.AGGRESSIVE else 0)


def answers(plan: str, directions, changed=()) -> list[float]:
    """What a corrector makes of denoised latents 0 when the directions are these: the latents are then σ·d.

    changed: evaluations in place of the plan's own, by step.
    """
    corrector = Corrector(Timeline(SIGMAS), Plan.parse(plan))
    results = []
    for step, direction in enumerate(directions):
        latent = torch.tensor([SIGMAS[step] * direction], dtype=torch.float64)
        told = dict(changed).get(step) or evaluation(step, plan)
        results.append(float(corrector.answer(told, latent, torch.zeros(1, dtype=torch.float64))))
    return results


def test_a_gap_is_made_up_for_by_the_hand_worked_amount():
    """The forecast direction was 1 where the line from 1 to 3 has 2: the latent should be 0.2 lower, a third of which
    the model takes away before the next full evaluation. So the next latent must be 0.2 · 2/3 lower."""
    corrected = answers("FaFFF", [1, 1, 3, 5, 0])
    assert corrected[:2] == [0, 0] and corrected[3:] == [0, 0]
    latent = 0.6 * 3
    after = latent + (0.4 - 0.6) * (latent - corrected[2]) / 0.6
    assert after - (latent + (0.4 - 0.6) * 3) == pytest.approx(-0.2 * 2 / 3)


def test_the_steps_up_to_the_next_full_one_share_it():
    """A denoised latent that is c higher makes the next latent (1 - σ'/σ)·c higher: 1/3 and 1/2 of it here."""
    first, second = answers("FaFaF", [1, 1, 3, 3, 0])[2:4]
    assert first == second
    assert first / 3 + second / 2 == pytest.approx(-0.2 * 1 / 3)


def test_what_leaves_the_run_is_as_the_model_answers_it():
    assert answers("FaFaa", [1, 1, 3, 3, 3]) == answers("FaaaF", [1, 1, 3, 3, 9]) == [0, 0, 0, 0, 0]


def test_forecasts_that_were_right_are_left_alone():
    assert answers("FaFFF", [1, 2, 3, 4, 5]) == pytest.approx([0, 0, 0, 0, 0])


@pytest.mark.parametrize(
    "changed",
    [
        {1: evaluation(1, "FaFFF", Kind.FULL)},  # when no memory was left
        {1: evaluation(1, "FcFF")},  # closer to the truth than a line is
        {0: evaluation(0, "FaFFF", calls=0)},  # another node answered
    ],
    ids=["computed", "conservative", "not ours"],
)
def test_what_is_not_a_forecast_between_two_full_evaluations_is_not_corrected(changed):
    assert answers("FaFFF", [1, 1, 3, 5, 0], changed) == [0, 0, 0, 0, 0]


def test_small_noise_levels_may_share_a_timestep():
    times, plan = [1.0, 0.5, 0.5, 0.5, 0.0, 0.0], "FFaFF"
    corrector = Corrector(Timeline(SIGMAS, times), Plan.parse(plan))
    for step, direction in enumerate([1, 1, 5, 9, 0]):
        latent = torch.tensor([SIGMAS[step] * direction])
        assert float(corrector.answer(evaluation(step, plan), latent, torch.zeros(1))) == 0


def test_evaluations_out_of_order_start_anew():
    corrector = Corrector(Timeline(SIGMAS), Plan.parse("FaFFF"))
    latents = [torch.ones(1), torch.ones(1), torch.ones(1) * 3]
    for step in (0, 1, 1, 2):
        result = corrector.answer(evaluation(step, "FaFFF"), latents[step], torch.zeros(1))
    assert float(result) == 0 and corrector.corrected == 0


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


def uncorrected(speedup: float) -> dict:
    return {"chosen": Strategy(FrontLoaded(speedup), AUTO)}


@pytest.mark.parametrize("prompt", ["red apple", "tiger face", "castle"])
def test_the_picture_is_closer_to_the_uncached_one(model, prompt):
    reference = sample(model, steps=28, prompt=prompt)
    plain, better = cached(model, **uncorrected(2.8)), cached(model, speedup=2.8)
    gain = psnr(sample(better, steps=28, prompt=prompt), reference) - psnr(sample(plain, steps=28, prompt=prompt), reference)
    assert gain > 0.2
    assert last_report(better).corrected == 8 and last_report(plain).corrected == 0  # nine gaps, the last of which ends the run


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
    """Each step's denoised latent, up to the first that follows a skipped one."""

    def steps_of(patched) -> list[torch.Tensor]:
        seen = []
        sample(patched, steps=6, callback=lambda _step, denoised, _x, _total: seen.append(denoised.clone()))
        return seen

    strategy = Strategy(Given(Plan.parse("FFFaFF")), AUTO, corrects=True)
    plain, ours = steps_of(model), steps_of(host.attach(model, Settings(chosen=strategy)))
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

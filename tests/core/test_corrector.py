"""Full evaluations correct the forecasts before them, by amounts worked out by hand."""

from __future__ import annotations

import pytest
import torch
from comfyui_duca.cache_core import Kind, Plan, Timeline
from comfyui_duca.cache_core.corrector import Corrector
from comfyui_duca.cache_core.meter import Evaluation

SIGMAS = [1.0, 0.8, 0.6, 0.4, 0.2, 0.0]


def evaluation(step: int, plan: str, kind: Kind | None = None, calls: int = 1) -> Evaluation:
    planned = Plan.parse(plan)[step]
    kind = kind or planned
    return Evaluation(step, step, SIGMAS[step], planned, kind, calls, skipped=calls if kind is Kind.SKIPPED else 0)


def answers(plan: str, directions, changed=()) -> list[float]:
    """Returns a corrector's answers for denoised latents of 0, where the latents are σ·d for the given directions d.

    Args:
        plan: The kinds.
        directions: One for each step.
        changed: Evaluations that replace the plan's own, by step.
    """
    corrector = Corrector(Timeline(SIGMAS), Plan.parse(plan))
    results = []
    for step, direction in enumerate(directions):
        latent = torch.tensor([SIGMAS[step] * direction], dtype=torch.float64)
        evaluated = dict(changed).get(step) or evaluation(step, plan)
        results.append(float(corrector.answer(evaluated, latent, torch.zeros(1, dtype=torch.float64))))
    return results


def test_a_gap_is_corrected_by_the_hand_worked_amount():
    """The forecast direction was 1 where the line from 1 to 3 has 2, so the latent should be 0.2 lower. The model takes a third of that
    away before the next full evaluation, so the next latent must be 0.2 · 2/3 lower.
    """
    corrected = answers("FaFFF", [1, 1, 3, 5, 0])
    assert corrected[:2] == [0, 0] and corrected[3:] == [0, 0]
    latent = 0.6 * 3
    after = latent + (0.4 - 0.6) * (latent - corrected[2]) / 0.6
    assert after - (latent + (0.4 - 0.6) * 3) == pytest.approx(-0.2 * 2 / 3)


def test_the_steps_up_to_the_next_full_one_share_it():
    """A denoised latent that is c higher makes the next latent (1 - σ'/σ)·c higher: here 1/3 and 1/2 of it."""
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
        {1: evaluation(1, "FaFFF", Kind.FULL)},  # as where memory was short
        {1: evaluation(1, "FcFF")},  # nearer to the truth than a line is
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

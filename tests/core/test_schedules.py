"""Timelines and policies make the schedules that were worked out by hand."""

from __future__ import annotations

import pytest
import torch
from comfyui_duca.cache_core import Kind, Plan, RunStart, Settings, Timeline
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.planning.policies import AlwaysCompute, DucaCycle, FixedInterval, FrontLoaded, Given, IccCycle


def text(policy, steps: int, window: range | None = None) -> str:
    return str(policy.plan(steps, range(steps) if window is None else window))


@pytest.mark.parametrize(
    ("policy", "steps", "expected"),
    [
        (AlwaysCompute(), 4, "FFFF"),
        (DucaCycle(5, warmup=1), 12, "FcacaFcacaFc"),  # the paper's cycle
        (DucaCycle(5, warmup=3), 12, "FFFcacaFcaca"),  # its FLUX setting
        (DucaCycle(4, warmup=1, tail=2), 10, "FcacFcacFF"),
        (DucaCycle(4, between="c", warmup=1), 6, "FcccFc"),  # ToCa-like
        (DucaCycle(1), 4, "FFFF"),
        (DucaCycle(5, warmup=0), 6, "FcacaF"),  # the first step is full whatever the warm-up
        (FixedInterval(3, warmup=1), 8, "FaaFaaFa"),
        (FixedInterval(4, warmup=3, tail=1), 12, "FFFaaaFaaaFF"),
        (IccCycle(), 5, "FiFiF"),
        (IccCycle(3), 8, "FiiFiiFi"),
        (IccCycle(4, warmup=2, tail=2), 10, "FFiiiFiiFF"),
    ],
)
def test_hand_worked_schedules(policy, steps, expected):
    assert text(policy, steps) == expected


def test_mode_auto_walks_along_the_nested_plans():
    for speedup in (1.4, 2.0, 2.8, 5.6):
        assert Settings(speedup=speedup).strategy(start_of(28)).policy == FrontLoaded(speedup)
    assert text(Settings(speedup=4.0, tail=3).strategy(start_of(12)).policy, 12) == "FaaaaaaaaFFF"


def test_a_window_keeps_everything_outside_it_full():
    assert text(DucaCycle(5, warmup=1), 10, range(2, 7)) == "FFcacaFFFF"
    assert text(FixedInterval(3, warmup=1), 8, range(0)) == "FFFFFFFF"
    assert text(IccCycle(3), 10, range(3, 8)) == "FFFiiFiiFF"
    assert text(Given(Plan.parse("FaFaFcaiaa")), 10, range(2, 8)) == "FFFaFcaiFF"


def test_a_given_plan_is_refused_for_another_number_of_steps():
    assert text(Given(Plan.parse("FaiF")), 4) == "FaiF"
    with pytest.raises(ValueError, match="for 4 steps and this run has 5"):
        Given(Plan.parse("FaiF")).plan(5, range(5))


@pytest.mark.parametrize("bad", ["FxF", "Fa!", "f"])
def test_a_plan_names_the_wrong_character(bad):
    wrong = next(i for i, letter in enumerate(bad) if letter not in "Fica") + 1
    with pytest.raises(ValueError, match=f"character {wrong} "):
        Plan.parse(bad)


@pytest.mark.parametrize("text", ["(Fa)*", "F(a)*", "F(a)*F"])
def test_a_plan_names_every_step(text):
    with pytest.raises(ValueError, match="must name every step"):
        Plan.parse(text)


def test_a_plan_cannot_begin_with_a_skip():
    with pytest.raises(ValueError, match="first step"):
        Plan.parse("aF")


SIGMAS = [1.0, 0.8, 0.5, 0.2, 0.0]


@pytest.mark.parametrize(
    ("sigma", "step"),
    [(1.0, 0), (0.8, 1), (0.5, 2), (0.2, 3), (0.9, 0), (0.63, 1), (0.05, 3), (0.0, 3), (1.2, 0), (0.8001, 1), (0.7999, 1)],
)
def test_a_noise_level_finds_its_step(sigma, step):
    """On a noise level (within rounding), between two (dpm_2), above the first (churn) and below the last."""
    assert Timeline(SIGMAS).step_of(sigma) == step


def test_equal_noise_levels_belong_to_the_later_step():
    assert Timeline([1.0, 0.5, 0.5, 0.0]).step_of(0.5) == 2


def test_time_is_interpolated_between_steps():
    timeline = Timeline([10.0, 4.0, 0.0], times=[1.0, 0.5, 0.0])
    assert [timeline.time_of(s) for s in (12.0, 10.0, 7.0, 4.0, 2.0, 0.0)] == [1.0, 1.0, 0.75, 0.5, 0.25, 0.0]


def test_windows_follow_the_noise_levels():
    timeline = Timeline(SIGMAS)
    assert timeline.window(1.0, 0.0) == range(0, 4)
    assert timeline.window(0.85, 0.3) == range(1, 3)
    assert timeline.window(0.45, 0.4) == range(0)
    assert Timeline(SIGMAS[2:]).window(0.85, 0.3) == range(0, 1)  # an image-to-image run that starts at 0.5


@pytest.mark.parametrize("sigmas", [[1.0], [0.5, 1.0], [1.0, 0.5, 0.6]])
def test_unusable_noise_levels_are_refused(sigmas):
    with pytest.raises(ValueError):
        Timeline(sigmas)


@pytest.mark.parametrize(
    "bad",
    [
        {"mode": "turbo"},
        {"speedup": 0.9},
        {"token_share": 1.1},
        {"token_share": -0.1},
        {"skip_from": 0.6, "skip_to": 0.5},
        {"skip_to": 1.5},
        {"tail": -1},
        {"cycle_length": -1},
        {"predictor": "magic"},
    ],
)
def test_bad_settings_are_refused(bad):
    with pytest.raises(ValueError, match=r"\d|unknown|negative"):
        Settings(**bad)


def start_of(steps: int) -> RunStart:
    """Returns the start of a run, of a model that no policy looks at."""
    timeline = Timeline([1 - i / steps for i in range(steps + 1)])
    return RunStart(torch.nn.Module(), FLUX, timeline, range(steps))


@pytest.mark.parametrize(("speedup", "steps"), [(1.5, 20), (2.0, 28), (3.0, 28), (4.0, 50), (6.0, 50)])
def test_paper_mode_follows_the_slider(speedup, steps):
    """The shortest cycle that is fast enough is taken: one step shorter would be too slow."""
    policy = Settings(mode="paper", speedup=speedup).strategy(start_of(steps)).policy

    def cost(cycle: DucaCycle) -> float:
        plan = cycle.plan(steps, range(steps))
        return plan.count(Kind.FULL) + 0.07 * plan.count(Kind.CONSERVATIVE)

    assert steps / cost(policy) >= speedup * 0.98 or policy.cycle_length == steps
    assert steps / cost(DucaCycle(policy.cycle_length - 1)) < speedup * 0.99


def test_the_slider_at_one_computes_everything():
    for mode in ("auto", "forecast", "off"):
        assert set(str(Settings(mode=mode, speedup=1.0).strategy(start_of(20)).policy.plan(20, range(20)))) == {"F"}

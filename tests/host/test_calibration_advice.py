"""What a calibration recommends for a run, and how modes auto and icc use it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, RunStart, Settings, Timeline
from comfyui_duca.cache_core.calibration.calibration import ORIGINS, Calibration, Factors
from comfyui_duca.cache_core.calibration.use import NotCoveredError, check_covered, nested_plan, origin_plan, searched_plan, tried_plan_at
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.planning.policies import FrontLoaded, IccCycle
from comfyui_duca.cache_core.planning.schedule import Schedule
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.nodes.page.plan_preview import _start, _without_calibration
from comfyui_duca.nodes.page.plan_request import Asked
from helpers.calibrations import STEP_TIMES, K, calibration_of, forecast_of, some_factors
from torch import nn

# -- what is recommended ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [K, 6, 25])
def test_the_nearest_choice_is_taken(steps):
    """The nearest by share of full evaluations."""
    forecast = forecast_of()
    shares = [tried.plan.count(Kind.FULL) / K for tried in forecast.tried]
    for full in range(1, steps + 1):
        nearest = int(np.argmin([abs(share - full / steps) for share in shares]))
        assert tried_plan_at(forecast, steps, full) is forecast.tried[nearest]


@pytest.mark.parametrize("times", [[1.4, 0.8, 0.3], [1.0, 0.5, -0.05]])
def test_times_outside_the_calibrated_ones_are_not_covered(times):
    """Recorded times go from 1 to 0.1; 0.1 more is covered at both ends."""
    for asks in (check_covered, lambda forecast, times: searched_plan(forecast, times, range(3), 2, "general", True)):
        with pytest.raises(NotCoveredError, match=r"1 to 0\.1"):
            asks(forecast_of(), times)
        asks(forecast_of(), [1.09, 0.5, 0.01])


@pytest.mark.parametrize(
    ("start", "window", "full", "expected"),
    [
        ("even gaps", range(10), 4, "FaFaaFaaFa"),  # the middles of three equal parts of nine steps
        ("even gaps", range(10), 1, "Faaaaaaaaa"),
        ("even gaps", range(10), 10, "FFFFFFFFFF"),
        ("even gaps", range(3, 8), 7, "FFFaFaFaFF"),  # five of them are full in any case
        ("even gaps", range(3, 8), 3, "FFFaaaaaFF"),
        ("general", range(10), 4, str(FrontLoaded(2.5).plan(10, range(10)))),
        ("general", range(10), 12, "FFFFFFFFFF"),
    ],
)
def test_searches_start_with_the_number_of_full_evaluations(start, window, full, expected):
    assert str(origin_plan(start, 10, window, full)) == expected


def start_of(times, network=None, window=None, is_euler=True) -> RunStart:
    steps = len(times)
    timeline = Timeline([*times, 0.0], [*times, 0.0])
    return RunStart(network or nn.Module(), FLUX, timeline, range(steps) if window is None else window, is_euler=is_euler)


def test_mode_auto_follows_a_calibration():
    forecast = forecast_of()
    settings = Settings(speedup=K / 5, calibration=calibration_of(forecast, None))
    strategy = settings.strategy(start_of(STEP_TIMES))
    plain = Settings(speedup=K / 5).strategy(start_of(STEP_TIMES))
    assert strategy.policy == plain.policy and strategy.predictor.share == 0.5 and not strategy.notices
    assert plain.predictor is AUTO and strategy.name == plain.name + ", calibrated"
    scheduled = replace(settings, schedule=Schedule("fixed interval", cycle_length=2)).strategy(start_of(STEP_TIMES))
    assert scheduled.predictor.share == 0.5 and not scheduled.notices
    far = replace(settings, schedule=Schedule("fixed interval", cycle_length=2)).strategy(start_of([3.0, 2.0, 1.0, 0.5]))
    assert far.predictor is AUTO and "the calibration is not used" in far.notices[0]


@pytest.mark.parametrize("start", ORIGINS)
def test_mode_auto_takes_a_searched_plan_where_that_did_best(start):
    """The search starts where the calibration's did. It counts on the corrector, so it is for Euler samplers only."""
    forecast, general = forecast_of(), FrontLoaded(K / 4, tail=2)
    forecast = replace(forecast, tried=tuple(replace(tried, searched_from=start) for tried in forecast.tried))
    settings = Settings(speedup=K / 4, tail=2, calibration=calibration_of(forecast, None))
    strategy = settings.strategy(start_of(STEP_TIMES))
    plan = strategy.policy.plan(K, range(K))
    assert plan == searched_plan(forecast, STEP_TIMES, range(K - 2), 4, start, True) != general.plan(K, range(K))
    assert plan.count(Kind.FULL) == 4 and plan[K - 2] is plan[K - 1] is Kind.FULL and strategy.name.endswith("x, calibrated")
    part = start_of(STEP_TIMES, window=range(3, 8))
    windowed = settings.strategy(part).policy.plan(K, part.window)
    assert all(windowed[step] is Kind.FULL for step in (0, 1, 2, 7, 8))
    elsewhere = settings.strategy(start_of(STEP_TIMES, is_euler=False))
    assert elsewhere.policy == general and elsewhere.predictor == strategy.predictor
    assert not strategy.notices and "is used with the samplers euler and ddim only" in elsewhere.notices[0]


@pytest.mark.parametrize(
    ("sampling", "is_followed"),
    [({}, True), *(({"sampler_name": name}, name in ("euler", "ddim")) for name in ("euler", "ddim", "heun", "dpmpp_2m", "?", 3))],
    ids=str,
)
def test_the_page_shows_the_plan_that_will_run(sampling, is_followed):
    """It is searched if the sampler on the canvas is Euler's, or if none was found."""
    forecast = forecast_of()
    forecast = replace(forecast, tried=tuple(replace(each, searched_from="general") for each in forecast.tried))
    settings = Settings(speedup=K / 4, calibration=calibration_of(forecast, None))
    strategy = settings.strategy(_start(Asked(settings, None, None, sampling, range(K), K, False)))
    expected = searched_plan(forecast, STEP_TIMES, range(K), 4, "general", True) if is_followed else FrontLoaded(K / 4).plan(K, range(K))
    assert strategy.policy.plan(K, range(K)) == expected


def test_a_calibration_that_was_no_better_says_so():
    """That is, if no choice was surely better when they were tried."""
    forecast = forecast_of()
    forecast = replace(forecast, tried=tuple(replace(tried, share=None) for tried in forecast.tried))
    strategy = Settings(speedup=K / 5, calibration=calibration_of(forecast, None)).strategy(start_of(STEP_TIMES))
    assert strategy.predictor is AUTO and strategy.name.endswith(", calibrated: no gain at this speed") and not strategy.notices


def test_mode_auto_without_a_fitting_calibration_is_the_uncalibrated_setting():
    far = start_of([3.0, 2.0, 1.0, 0.5])
    plain = Settings(speedup=2.0, tail=1).strategy(far)
    assert plain.policy == FrontLoaded(2.0, tail=1) and plain.predictor == AUTO
    assert len(plain.notices) == 1 and plain.notices[0].startswith("only 2 of 4 steps are computed in full")
    strategy = Settings(speedup=2.0, tail=1, calibration=calibration_of(forecast_of(), None)).strategy(far)
    assert strategy.notices and strategy == replace(plain, notices=strategy.notices)
    notices = []
    run = CacheRun(strategy, RunStart(torch.nn.Module(), FLUX, far.timeline, far.window), say=notices.append)
    assert notices == run.report.notices == list(strategy.notices) and "the calibration is not used" in notices[0] and "3" in notices[0]
    factors = Settings(speedup=2.0, tail=1, calibration=calibration_of(None, some_factors())).strategy(far)
    notice, few = factors.notices
    assert factors == replace(plain, notices=(notice, few)) and "the calibration is not used: it has only low-rank factors" in notice


def test_each_of_two_calibrations_gives_what_it_has():
    """DuCa Cache's has the forecast, Cache Schedule's the factors, or the other way round."""
    layers = [nn.ModuleDict({"l": nn.Linear(4, 6)}) for _ in range(2)]
    network = nn.ModuleDict({"s": nn.ModuleList(layers), "d": nn.ModuleList(layers)})
    forecast, factors = calibration_of(forecast_of(), None), calibration_of(None, some_factors())
    for own, wired in ((forecast, factors), (factors, forecast)):
        schedule = Schedule("custom text", text="F i a F", calibration=wired)
        strategy = Settings(calibration=own, schedule=schedule).strategy(start_of(STEP_TIMES, network))
        assert strategy.factors is factors.factors.tensors and strategy.predictor.share == 0.5
        searched = Schedule("searched", K / 4, calibration=wired)
        plan = Settings(calibration=own, schedule=searched).strategy(start_of(STEP_TIMES, network)).policy.plan(K, range(K))
        assert plan == nested_plan(forecast.forecast, STEP_TIMES, range(1, K), 4, True)


def test_a_preview_without_the_calibration_keeps_the_rest_of_the_schedule():
    schedule = Schedule("searched", 3.0, cycle_length=4, unit="steps", skip_from=2, skip_to=6, warmup=2, tail=1, first_only=True)
    shown = _without_calibration(Settings(mode="auto", token_share=0.3, schedule=schedule))
    assert shown == Settings(mode="auto", token_share=0.3, schedule=replace(schedule, policy="front-loaded"))


# -- mode icc -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def icc(sites) -> Calibration:
    """Returns factors of rank 32 in the shapes of the demo model's layers."""
    tensors, energy = {}, {}
    for site in sites:
        for part in site.parts:
            key = site.key(part)
            tensors |= {f"{key}.A": torch.zeros(site.outputs(part), 32), f"{key}.B": torch.zeros(32, site.in_features)}
            energy[key] = 1.0
    return calibration_of(None, Factors(tensors, energy))


def test_mode_icc_needs_factors(network):
    for calibration in (None, calibration_of(forecast_of(), None)):
        with pytest.raises(ValueError, match="needs low-rank factors of this model"):
            Settings(mode="icc", calibration=calibration).strategy(start_of(STEP_TIMES, network))


def test_mode_icc_refuses_the_factors_of_another_model(network):
    with pytest.raises(ValueError, match="another model"):
        Settings(mode="icc", calibration=calibration_of(None, some_factors())).strategy(start_of(STEP_TIMES, network))


def test_mode_icc_takes_the_length_it_is_given(network, icc):
    strategy = Settings(mode="icc", cycle_length=4, warmup=2, tail=1, calibration=icc).strategy(start_of(STEP_TIMES, network))
    assert strategy.policy == IccCycle(4, 2, 1) and strategy.factors is icc.factors.tensors
    assert "ca_svd" in strategy.name and "every 4" in strategy.name


@pytest.mark.parametrize(("speedup", "steps"), [(1.2, 28), (1.5, 28), (2.0, 28), (2.4, 50), (9.0, 28)])
def test_mode_icc_follows_the_slider(network, icc, speedup, steps):
    """The shortest cycle that is fast enough is taken. At rank 32 and width 256 a block's parts, with 4608 channels in and out together,
    cost 32·4608 of the dense 12·256² multiply-adds. Attention is a tenth of a full evaluation more.
    """
    calibrated = 32 * 4608 / (12 * 256**2) + 0.1

    def speed(length: int) -> float:
        plan = IccCycle(length).plan(steps, range(steps))
        return steps / (plan.count(Kind.FULL) + calibrated * plan.count(Kind.INCREMENTAL))

    times = np.linspace(1.0, 0.1, steps).tolist()
    length = Settings(mode="icc", speedup=speedup, calibration=icc).strategy(start_of(times, network)).policy.interval
    assert speed(length) >= speedup * 0.98 or length == steps  # nine times faster is more than any cycle gives
    assert length > 1 and speed(length - 1) < speedup * 0.99

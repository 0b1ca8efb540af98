"""Cache Schedule makes nested plans within their budget, and DuCa Cache follows them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from comfyui_duca.cache_core import Kind, RunStart, Settings, Timeline
from comfyui_duca.cache_core.calibration.calibration import Calibration
from comfyui_duca.cache_core.calibration.sidecar import About
from comfyui_duca.cache_core.calibration.use import NotCoveredError, nested_plan
from comfyui_duca.cache_core.costs import assumed_costs
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.planning import schedule as schedule_module
from comfyui_duca.cache_core.planning.policies import POLICIES, FixedInterval, FrontLoaded, Within
from comfyui_duca.cache_core.planning.schedule import Schedule
from comfyui_duca.cache_core.predictors import AUTO, Calibrated, Chebyshev, Reuse
from comfyui_duca.cache_core.tuning import Wishes
from comfyui_duca.nodes import cache_schedule
from comfyui_duca.nodes.cache_schedule import CacheSchedule
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.inputs.settings import schedule_of, settings_of
from comfyui_duca.nodes.sidecars import fingerprint_of
from helpers.calibrations import random_forecast
from helpers.sampling import cached, kinds, last_report, perturbed, sample
from helpers.tuner import calibrator
from hypothesis import given, settings
from hypothesis import strategies as st

INPUTS = {
    "kind": "front-loaded", "speedup": 2.0, "cycle_length": 0, "text": "F", "unit": "percent", "skip_from": 0.0, "skip_to": 100.0,
    "warmup": 1, "tail": 0, "several_evaluations": "as their step",
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


@pytest.fixture(scope="module")
def calibration(model):
    """Returns a calibration from two prompts and twelve steps."""
    learned = calibrator(model, Wishes(speedups=(2.0, 3.0), directions=16), steps=12).run()
    about = About("flux", "m", "euler", "simple", 12, 2.5, (1.0,) * 13, learned.times, (24, 24), 2, (100, 101), 0, "", {}, "2026-01-02")
    return Calibration(about, fingerprint_of(model), learned.forecast)


def plan(speedup: float, steps: int, warmup: int = 1, tail: int = 0, window: range | None = None) -> str:
    return str(FrontLoaded(speedup, warmup, tail).plan(steps, range(steps) if window is None else window))


# -- nested plans ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (plan(1.0, 8), "FFFFFFFF"),
        (plan(8 / 7, 8), "FFFFFaFF"),  # of 1, 3 and 5, the last
        (plan(2.0, 8), "FaFaFaaF"),  # 4; 2 and the last; then 6 (due at 0.75) and 1 (0.81)
        (plan(8 / 3, 8), "FaaaFaaF"),
        (plan(4.0, 8), "FaaaFaaa"),
        (plan(8.0, 8), "FaaaFaaa"),  # at least two
        (plan(3.5, 28), "FaFaFaaaFaaaFaaaFaaaFaaaFaaa"),  # 8, 16, 24, 4, 12, 20, then 2
        (plan(2.0, 28), "FFFFFaFaFaFaFaFaFaaaFaaaFaaF"),  # the last, 6, 1 (due at 0.29), 10 (0.36), 3 (0.40), 14 (0.50)
        (plan(8 / 5, 8), "FaFaFaFF"),
        (plan(2.0, 12), "FaFaFaFaFaaF"),
        (plan(2.0, 6), "FaFaFa"),
        (plan(2.0, 10), "FaFaFaFaFa"),  # the last follows the ninth, which was taken first, and so has to wait for the seventh
        (plan(10 / 6, 10), "FaFaFaFaFF"),
        (plan(2.0, 12, warmup=3), "FFFaFaFaaaFa"),  # 6 of 12: three, then distances 8, 4 and 2 from the third
        (plan(1.7, 12, warmup=3), "FFFaFaFaFaFa"),  # and distance 6
        (plan(2.0, 12, tail=2), "FaFaFaaaFaFF"),
        (plan(6.0, 10, window=range(3, 8)), "FFFFaaaaFF"),
        (plan(3.0, 1), "F"),
    ],
)
def test_front_loaded_by_hand(text, expected):
    assert text == expected


@given(
    steps=st.integers(1, 200),
    speeds=st.lists(st.floats(1, 300), min_size=2, max_size=5),
    warmup=st.integers(0, 220),
    tail=st.integers(0, 220),
    window=st.tuples(st.integers(0, 200), st.integers(0, 200)),
)
def test_a_higher_speed_only_takes_full_steps_away(steps, speeds, warmup, tail, window):
    inside = range(min(window[0], steps), min(sum(window), steps))
    plans = [FrontLoaded(speed, warmup, tail).plan(steps, inside) for speed in sorted(speeds)]
    for speed, chosen in zip(sorted(speeds), plans):
        forced = sum(step < max(warmup, 1) or step >= steps - tail or step not in inside for step in range(steps))
        budget = max(1, round(steps / speed))
        assert len(chosen) == steps and chosen[0] is Kind.FULL
        assert chosen.count(Kind.FULL) <= max(budget, forced + 1)  # the step where gaps begin is full as well
    for slower, faster in pairwise(plans):
        assert all(slower[step] is Kind.FULL for step in range(steps) if faster[step] is Kind.FULL)


@given(steps=st.integers(1, 200), speedup=st.floats(1, 10))
def test_front_loaded_meets_its_budget_and_gaps_never_shrink(steps, speedup):
    chosen = str(FrontLoaded(speedup).plan(steps, range(steps)))
    assert chosen.count("F") == max(min(2, steps), round(steps / speedup))
    gaps = [len(gap) for gap in chosen[: 1 + chosen.rstrip("F").rfind("F")].split("F")[1:]]  # up to the last step, which is not in order
    assert gaps[:-1] == sorted(gaps[:-1])


@settings(max_examples=12, deadline=None)
@given(seed=st.integers(0, 5), steps=st.sampled_from([1, 2, 9, 12, 20, 41, 90]), first=st.integers(0, 4))
def test_searched_plans_are_nested_too(seed, steps, first):
    forecast = random_forecast(seed)
    times = [1 - i / steps for i in range(steps)]
    window = range(min(first, steps), steps)
    plans = [nested_plan(forecast, times, window, full, seed % 2 == 0) for full in (steps, steps // 2, steps // 3, 1)]
    for full, chosen in zip((steps, steps // 2, steps // 3, 1), plans):
        assert chosen[0] is Kind.FULL and all(chosen[step] is Kind.FULL for step in range(steps) if step not in window)
        assert chosen.count(Kind.FULL) == max(full, 1, min(first, steps))
    for slower, faster in pairwise(plans):
        assert all(slower[step] is Kind.FULL for step in range(steps) if faster[step] is Kind.FULL)
    with pytest.raises(NotCoveredError):
        nested_plan(forecast, [1.5, 0.5], range(2), 1, True)


def test_a_run_that_is_too_long_to_search_for(calibration):
    """The search would take minutes for a thousand steps, so the schedule says so and is front-loaded."""
    forecast = random_forecast(0)
    times = [1 - i / 301 for i in range(301)]
    with pytest.raises(NotCoveredError, match="301 steps; plans can be searched for up to 300"):
        nested_plan(forecast, times, range(301), 9, True)
    policy, notices = Schedule("searched", 3.0, calibration=calibration).policy_for(start_of(1000), assumed_costs(0.1), None)
    assert str(policy.plan(1000, range(1000))) == plan(3.0, 1000) and "searched for up to 300" in notices[0]


# -- schedules ------------------------------------------------------------------------------------------------------------------


def start_of(steps: int, window: range | None = None) -> RunStart:
    """Returns the start of a run, of a model that no schedule looks at."""
    timeline = Timeline([1 - i / steps for i in range(steps + 1)])
    return RunStart(torch.nn.Module(), FLUX, timeline, range(steps) if window is None else window)


def planned(steps: int, window: range | None = None, **schedule) -> str:
    start = start_of(steps, window)
    return str(Schedule(**schedule).policy_for(start, assumed_costs(0.1), None)[0].plan(steps, start.window))


@pytest.mark.parametrize("kind", [kind for kind in POLICIES if kind != "searched"])
@given(steps=st.integers(1, 200), speedup=st.floats(1, 6), warmup=st.integers(0, 30), tail=st.integers(0, 30), first=st.integers(0, 60))
def test_every_kind_keeps_its_promises(kind, steps, speedup, warmup, tail, first):
    given = {"policy": kind, "speedup": speedup, "warmup": warmup, "tail": tail, "unit": "steps", "skip_from": first, "skip_to": 0}
    chosen = planned(steps, **given)
    assert len(chosen) == steps and chosen[0] == "F"
    assert set(chosen[: max(warmup, min(first, steps))]) <= {"F"} and set(chosen[max(0, steps - tail) :]) <= {"F"}


def test_steps_and_percent_hold_a_schedule_to_a_part():
    assert planned(10, policy="fixed interval", cycle_length=3, unit="steps", skip_from=4, skip_to=8) == "FFFFaaFaFF"
    assert planned(10, range(4, 8), policy="fixed interval", cycle_length=3) == "FFFFaaFaFF"
    assert Settings(schedule=Schedule(skip_from=25, skip_to=75), skip_from=0.5).part == (0.25, 0.75)
    assert Settings(schedule=Schedule(unit="steps", skip_from=3, skip_to=5), skip_from=0.5).part == (0.0, 1.0)
    assert Settings(skip_from=0.5).part == (0.5, 1.0)
    assert str(Within(FrontLoaded(8.0), 2, 6).plan(8, range(8))) == "FFFaaaFF"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"kind": "best"}, "unknown schedule"),
        ({"unit": "seconds"}, "unknown unit"),
        ({"speedup": 0.5}, "at least 1"),
        ({"tail": -1}, "negative"),
        ({"skip_from": 60.0, "skip_to": 40.0}, "percent with"),
        ({"skip_to": 101.0}, "percent with"),
        ({"unit": "steps", "skip_from": 6, "skip_to": 4}, "steps with"),
        ({"kind": "custom text", "text": "F b"}, "'b', character 3"),
        ({"several_evaluations": "none"}, "several_evaluations"),
    ],
)
def test_bad_schedules_are_refused_before_anything_runs(wrong, words):
    with pytest.raises(ValueError, match=words):
        schedule_of(**{**INPUTS, **wrong})
    answer = CacheSchedule.validate_inputs(**{**INPUTS, **wrong})
    assert isinstance(answer, str) and answer
    assert CacheSchedule.validate_inputs(**INPUTS) is True
    assert CacheSchedule.validate_inputs(**{**INPUTS, **wrong, "speedup": None}) is True  # a linked value is checked when it is known


# -- on the host ----------------------------------------------------------------------------------------------------------------


def test_duca_cache_follows_the_schedule_and_not_its_slider(model):
    schedule = schedule_of(**{**INPUTS, "kind": "custom text", "text": "2F (aF)*"})
    patched = cached(model, mode="auto", speedup=6.0, warmup=4, schedule=schedule)
    sample(patched, steps=8)
    report = last_report(patched)
    assert kinds(report) == report.plan == "FFaFaFaF" and report.setting == "custom 2F (aF)*"


def test_the_mode_says_what_fills(model, calibration):
    schedule = Schedule("custom text", text="FF(aF)*")

    def predictor(**given):
        return Settings(schedule=schedule, **given).strategy(start_of(8)).predictor

    assert predictor(mode="auto") is AUTO and predictor(mode="paper") == Reuse() and predictor(mode="forecast") == Chebyshev()
    shares = [tried.share for tried in calibration.forecast.tried]
    filled = predictor(mode="auto", calibration=calibration)
    assert (filled is AUTO) == (shares[0] is None) and (filled is AUTO or isinstance(filled, Calibrated))
    assert str(Settings(mode="off", schedule=schedule).strategy(start_of(8)).policy.plan(8, range(8))) == "FFFFFFFF"


def test_a_duca_cycle_of_a_schedule_is_the_nodes_own(model):
    own = cached(model, mode="paper", cycle_length=4, warmup=2)
    scheduled = cached(model, mode="paper", schedule=Schedule("DuCa cycle", cycle_length=4, warmup=2))
    assert torch.equal(sample(own, steps=10), sample(scheduled, steps=10))
    assert kinds(last_report(scheduled)) == "FFcacFcacF"


def test_a_searched_schedule(model, calibration):
    """The plan is the one that the search finds in the middle of its order, on the host's Euler sampler and with the corrector in mind."""
    patched = cached(model, calibration=calibration, schedule=Schedule("searched", 2.0))
    sample(patched, steps=12, size=(24, 24))
    times = calibration.forecast.step_times
    assert kinds(last_report(patched)) == str(nested_plan(calibration.forecast, times, range(1, 12), 6, True))
    with pytest.raises(ValueError, match="needs a calibrated forecast"):
        sample(cached(model, schedule=Schedule("searched", 2.0)), steps=12)
    other = cached(model, schedule=Schedule("searched", 2.0, calibration=calibration))
    sample(other, steps=20)
    assert last_report(other).count(Kind.FULL) == 10


def test_only_the_first_of_several_evaluations_computes(model):
    """Heun evaluates every noise level but the first twice: in its second evaluation and in the next step's first."""
    text = {"kind": "custom text", "text": "FFaF"}
    every, first = (cached(model, schedule=schedule_of(**{**INPUTS, **text, "several_evaluations": how}))
                    for how in ("as their step", "first only"))  # fmt: skip
    images = [sample(patched, sampler="heun", steps=4) for patched in (every, first)]
    assert kinds(last_report(every)) == "FFFaaFF"[:7] and kinds(last_report(first)) == "FFaaaFa"[:7]
    assert not torch.equal(*images)
    assert last_report(first).peak_bytes <= last_report(first).predicted_bytes


def test_an_incremental_letter_without_factors_is_refused_with_a_remedy(model):
    with pytest.raises(ValueError, match="low-rank factors first"):
        sample(cached(model, schedule=Schedule("custom text", text="FiFa")), steps=8)


def test_a_schedules_calibration_of_another_checkpoint_is_refused(calibration):
    """As one on DuCa Cache itself is, before anything is sampled."""
    schedule = Schedule("searched", 3.0, calibration=calibration)
    with pytest.raises(ValueError, match="made on another checkpoint"):
        cached(perturbed(load_demo_model()), schedule=schedule)


def test_a_policy_in_the_table_is_offered_by_the_node(monkeypatch):
    """One line in the table: the node lists it, explains it and makes a schedule of it."""

    class Twice(FixedInterval):
        about = "every second step"

    table = {**POLICIES, "twice": Twice}
    for module in (cache_schedule, schedule_module):
        monkeypatch.setattr(module, "POLICIES", table)
    kind = next(field for field in CacheSchedule.define_schema().inputs if field.id == "kind")
    assert kind.options[-1] == "twice" and kind.tooltip.endswith("twice: every second step.")
    assert schedule_of(**{**INPUTS, "kind": "twice"}).policy == "twice"


def test_the_nodes_inputs_are_settings(model):
    cache = {
        "mode": "forecast", "speedup": 3.0, "predictor": "taylor1", "cycle_length": 4, "token_share": 0.2, "warmup": -1, "tail": 1,
        "start_percent": 0.1, "end_percent": 0.9, "store_device": "CPU", "store_dtype": "fp8", "token_seed": 5,
    }  # fmt: skip
    made = settings_of(**cache, schedule=Schedule())
    assert (made.skip_from, made.skip_to, made.warmup, made.seed) == (0.1, 0.9, None, 5) and made.schedule == Schedule()
    assert made.storage.dtype is torch.float8_e4m3fn and made.storage.device == torch.device("cpu")

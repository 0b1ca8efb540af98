"""A calibration: its way to a file and back, its forecast against float64, and what it recommends for which run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, Opening, Plan, Settings, Timeline
from comfyui_duca.cache_core.calibration.__main__ import main
from comfyui_duca.cache_core.calibration.calibration import STARTS, Calibration, Choice, Factors, Forecast
from comfyui_duca.cache_core.calibration.fingerprint import Fingerprint
from comfyui_duca.cache_core.calibration.sidecar import About, Sidecar, read, write
from comfyui_duca.cache_core.calibration.statistics import ForecastModel
from comfyui_duca.cache_core.calibration.use import NotCoveredError, check_covered, choice_at, searched_plan, start_plan
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.policies import FrontLoaded, IccCycle
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.schedule import Schedule
from comfyui_duca.nodes.plan_preview import _opening
from comfyui_duca.nodes.plan_request import Asked
from torch import nn

N, K, TOKENS, D, C, R = 7, 9, 60, 3, 8, 5
TIMES = (1.0, 0.9, 0.75, 0.55, 0.4, 0.2, 0.1)  # recorded
STEP_TIMES = tuple(1 - i / 10 for i in range(K))  # of the calibrated schedule
CPU = torch.device("cpu")


def features():
    """u (n, T, d) and z (n, T, C), float64: smooth paths, z partly a linear image of u."""
    random = np.random.default_rng(5)
    u = random.normal(size=(N, TOKENS, D)).cumsum(0)
    return u, u @ random.normal(size=(D, C)) + 0.4 * random.normal(size=(N, TOKENS, C)).cumsum(0)


def orthonormal(random=7):
    return np.linalg.qr(np.random.default_rng(random).normal(size=(C, R)))[0]


def model_of(sensitivity=(1.0, 3.0, 2.0, 5.0, 0.5, 1.5, 4.0)) -> ForecastModel:
    """The statistics of `features`, summed up token by token."""
    u, z = features()
    gram = np.einsum("atc,btc->ab", z, z) / TOKENS
    uu, uz = np.einsum("atd,bte->abde", u, u) / TOKENS, np.einsum("atd,btc->abdc", u, z) / TOKENS
    tensors = (torch.from_numpy(values) for values in (gram, uu, uz @ orthonormal(), orthonormal()))
    return ForecastModel(TIMES, *tensors, None if sensitivity is None else torch.tensor(sensitivity, dtype=torch.float64))


# -- the forecast against float64 ---------------------------------------------------------------------------------------------


def at(values, time):
    """Features at a time: linear between the recorded ones, and on beyond them."""
    lower = next((i for i in range(1, N) if time >= TIMES[i]), N - 1)
    share = (time - TIMES[lower]) / (TIMES[lower - 1] - TIMES[lower])
    return share * values[lower - 1] + (1 - share) * values[lower]


RUNS = [
    ([1.0], 0.9),
    ([1.0, 0.9], 0.55),
    ([0.9, 0.75, 0.4], 0.2),
    ([0.95, 0.8, 0.5], 0.3),  # between recorded times
    ([0.9, 0.55, 0.2], 0.05),  # and beyond them
]


def near(value, expected, tolerance=1e-5) -> bool:
    value, expected = np.asarray(value, dtype=np.float64), np.asarray(expected)
    return value.shape == expected.shape and np.abs(value - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize(("anchors", "time"), RUNS)
def test_least_squares_in_float64(anchors, time):
    """Stacked tokens, a damping row per anchor: a thousandth of its own mean square."""
    _, z = features()
    known = np.stack([at(z, anchor).ravel() for anchor in anchors], 1)
    damping = np.diag(np.sqrt(1e-3 * (known**2).sum(0)))
    target = np.concatenate((at(z, time).ravel(), np.zeros(len(anchors))))
    expected = np.linalg.lstsq(np.vstack((known, damping)), target, rcond=None)[0]
    assert near(model_of().least_squares(anchors, time), expected)


@pytest.mark.parametrize(("anchors", "time"), RUNS)
@pytest.mark.parametrize("own", [True, False], ids=["given weights", "best weights"])
def test_correction_and_errors_in_float64(anchors, time, own):
    """What `weights` leave, regressed on what they leave of the input; the errors are those met on the tokens themselves."""
    model, (u, z), basis = model_of(), features(), orthonormal()
    weights = [-0.4, 0.3, 0.7][-len(anchors) :] if own else None
    fit = model.fit(anchors, time, weights)
    used = weights if own else model.least_squares(anchors, time)
    assert list(fit.weights) == used
    du, dz = (at(values, time) - sum(w * at(values, anchor) for w, anchor in zip(used, anchors)) for values in (u, z))
    damping = np.sqrt(1e-3 * (du**2).sum() / D) * np.eye(D)
    a = np.linalg.lstsq(np.vstack((du, damping)), np.vstack((dz @ basis, np.zeros((D, R)))), rcond=None)[0]
    assert near(fit.correction, a)
    assert near(fit.plain_error, (dz**2).sum() / TOKENS)
    assert near(fit.error, ((dz - du @ a @ basis.T) ** 2).sum() / TOKENS)
    assert fit.error < 0.9 * fit.plain_error  # there was something to correct


def test_harm_in_float64():
    """An error's share of the latent grows with the stretch of time it stands for, and harm is a square."""
    model = model_of()
    assert near(model.harm(TIMES), [1.0, 3.0, 2.0, 5.0, 0.5, 1.5, 4.0])
    recorded = np.array([0.1, 0.15, 0.2, 0.15, 0.2, 0.1, 0.1])  # of TIMES, the last one down to 0
    density = model.sensitivity.numpy() / recorded**2
    for count in (3, 7, 20):
        times = np.linspace(1.0, 0.1, count)
        stretches = np.append(times[:-1] - times[1:], 0.1)
        expected = np.interp(times, TIMES[::-1], density[::-1]) * stretches**2
        assert near(model.harm(times.tolist()), expected)
    assert model_of(None).harm([0.8, 0.3]) == [1.0, 1.0]
    rising = model_of((1.0, 9.0, 2.0, 5.0, 0.5, 1.5, 4.0))  # from 100 to 400 a square of time: -50 at 1.05, and no harm is negative
    assert near(rising.harm([1.05, 1.02]), [0.0, (100 - 0.2 * 300) * 1.02**2])


# -- files --------------------------------------------------------------------------------------------------------------------


def forecast_of(model=None, *choices: Choice) -> Forecast:
    choices = choices or (
        Choice(Plan.parse("FFaFaFaFa"), 0.5, 34.5, 33.25),
        Choice(Plan.parse("FaaFaaaFa"), None, 30.125, 30.125),
        Choice(Plan.parse("Faaaaaaaa"), 0.0, 20.0, 19.0, "even gaps"),
    )
    return Forecast(model_of() if model is None else model, STEP_TIMES, choices)


def single(model: ForecastModel) -> ForecastModel:
    """With tensors in the dtypes of a file."""
    return replace(model, uu=model.uu.float(), uz=model.uz.float(), basis=model.basis.float())


def some_factors() -> Factors:
    """Of three layers, in an order that is not that of their names."""
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for part, rank in (("s.1.l.p", 2), ("d.0.l.q", 3), ("d.0.l.k", 1)):
        tensors |= {f"{part}.A": torch.randn(6, rank, generator=random).half(), f"{part}.B": torch.randn(rank, 4, generator=random).half()}
    return Factors(tensors, {"s.1.l.p": 0.5, "d.0.l.q": 0.75, "d.0.l.k": 0.25})


def calibration_of(forecast: Forecast | None, factors: Factors | None) -> Calibration:
    about = About(
        family="flux", model_name="m", sampler="euler", scheduler="simple", steps=K, guidance=2.5, sigmas=(*STEP_TIMES, 0.0), times=TIMES,
        token_grid=(12, 12), prompt_count=2, seeds=(0, 1), rank=3 if factors else 0, method="ca_svd" if factors else "",
        versions={"pack": "0.1"}, created="2026-01-02",
    )  # fmt: skip
    return Calibration(about, Fingerprint.of([("w", torch.linspace(-1, 1, 300))]), forecast, factors)


def through_a_file(calibration: Calibration, path: Path) -> Calibration:
    write(path, calibration.to_sidecar())
    return Calibration.from_sidecar(read(path))


def assert_same_forecast(a: Forecast, b: Forecast):
    assert (a.step_times, a.choices, a.model.times) == (b.step_times, b.choices, b.model.times)
    for name in ("gram", "uu", "uz", "basis", "sensitivity"):
        left, right = getattr(a.model, name), getattr(b.model, name)
        assert left.dtype is right.dtype and torch.equal(left, right), name


@pytest.mark.parametrize("has", ["forecast", "factors", "both"])
def test_what_is_written_is_read(tmp_path, has):
    before = calibration_of(
        forecast_of(single(model_of())) if has != "factors" else None, some_factors() if has != "forecast" else None
    )  # fmt: skip
    back = through_a_file(before, tmp_path / "c.safetensors")
    assert back.about == before.about and torch.equal(back.fingerprint.values, before.fingerprint.values)
    assert (back.forecast is None, back.factors is None) == (has == "factors", has == "forecast")
    if has != "factors":
        assert_same_forecast(back.forecast, before.forecast)
        fits = [model.fit([0.95, 0.8], 0.5) for model in (back.forecast.model, before.forecast.model)]
        assert torch.equal(fits[0].correction, fits[1].correction) and fits[0].error == fits[1].error
    if has != "forecast":
        assert dict(back.factors.energy) == before.factors.energy  # each part's own, whatever order the file keeps
        assert back.factors.tensors.keys() == before.factors.tensors.keys()
        assert all(torch.equal(back.factors.tensors[name], tensor) for name, tensor in before.factors.tensors.items())


def test_a_section_can_be_read_alone(tmp_path):
    write(tmp_path / "c", calibration_of(forecast_of(single(model_of())), some_factors()).to_sidecar())
    only_forecast, only_factors = (Calibration.from_sidecar(read(tmp_path / "c", [section])) for section in ("forecast", "icc"))
    assert only_forecast.factors is None and only_forecast.forecast is not None
    assert only_factors.forecast is None and only_factors.factors is not None


def test_unmeasured_sensitivities_come_back_as_ones(tmp_path):
    back = through_a_file(calibration_of(forecast_of(single(model_of(None))), None), tmp_path / "c")
    assert back.forecast.model.sensitivity.tolist() == [1.0] * N
    assert back.forecast.model.harm(TIMES) == pytest.approx([1.0] * N)


def test_statistics_in_half_precision_forecast_nearly_the_same(tmp_path):
    model = single(model_of())
    half = through_a_file(calibration_of(forecast_of(replace(model, uz=model.uz.half())), None), tmp_path / "c").forecast.model
    assert half.uz.dtype is torch.float16
    a, b = model.fit([0.95, 0.8], 0.5), half.fit([0.95, 0.8], 0.5)
    assert (
        a.weights == b.weights and near(b.correction, a.correction.double().numpy(), 1e-2) and not torch.equal(a.correction, b.correction)
    )


def test_a_shrunk_file_is_a_calibration_still(tmp_path):
    write(tmp_path / "c", calibration_of(forecast_of(single(model_of())), some_factors()).to_sidecar())
    assert main(["shrink", str(tmp_path / "c"), str(tmp_path / "small"), "--rank", "2", "--drop", "forecast"]) == 0
    small = Calibration.from_sidecar(read(tmp_path / "small"))
    assert small.forecast is None and small.about.rank == 2 and dict(small.factors.energy) == some_factors().energy
    assert {name: tuple(t.shape) for name, t in small.factors.tensors.items() if name.endswith("A")} == {
        "s.1.l.p.A": (6, 2), "d.0.l.q.A": (6, 2), "d.0.l.k.A": (6, 1),
    }  # fmt: skip


@pytest.mark.parametrize("number", [3.0, 0.5, -1.0])
def test_a_plan_of_unknown_kinds_is_refused(tmp_path, number):
    sidecar = calibration_of(forecast_of(single(model_of())), None).to_sidecar()
    sidecar.sections["forecast"]["plans"][1, 4] = number
    write(tmp_path / "c", sidecar)
    with pytest.raises(ValueError, match="kinds that this version does not know"):
        Calibration.from_sidecar(read(tmp_path / "c"))


def test_a_plan_that_begins_with_a_skip_is_refused():
    whole = calibration_of(forecast_of(), None).to_sidecar()
    whole.sections["forecast"]["plans"][0, 0] = 0.0
    with pytest.raises(ValueError, match="first step"):
        Calibration.from_sidecar(Sidecar(whole.about, whole.fingerprint, whole.sections))


def test_a_search_that_is_not_known_is_refused():
    """As a later version might begin one elsewhere."""
    whole = calibration_of(forecast_of(), None).to_sidecar()
    whole.sections["forecast"]["results"][0, 3] = 3.0
    with pytest.raises(ValueError, match="a way that this version does not know"):
        Calibration.from_sidecar(Sidecar(whole.about, whole.fingerprint, whole.sections))


# -- what is recommended ------------------------------------------------------------------------------------------------------


def full_steps(plan: Plan) -> list[int]:
    return [step for step, kind in enumerate(plan.kinds) if kind is Kind.FULL]


@pytest.mark.parametrize("steps", [K, 6, 25])
def test_the_nearest_choice_is_taken(steps):
    """By share of full evaluations."""
    forecast = forecast_of()
    shares = [choice.plan.count(Kind.FULL) / K for choice in forecast.choices]
    for full in range(1, steps + 1):
        nearest = int(np.argmin([abs(share - full / steps) for share in shares]))
        assert choice_at(forecast, steps, full) is forecast.choices[nearest]


@pytest.mark.parametrize("times", [[1.4, 0.8, 0.3], [1.0, 0.5, -0.05]])
def test_times_outside_the_calibrated_ones_are_not_covered(times):
    """Recorded from 1 to 0.1, and covered 0.1 further at both ends."""
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
    assert str(start_plan(start, 10, window, full)) == expected


def opening(times, network=None, window=None, is_euler=True) -> Opening:
    steps = len(times)
    timeline = Timeline([*times, 0.0], [*times, 0.0])
    return Opening(network or nn.Module(), FLUX, timeline, range(steps) if window is None else window, CPU, is_euler)


def test_mode_auto_follows_a_calibration():
    forecast = forecast_of()
    settings = Settings(speedup=K / 5, calibration=calibration_of(forecast, None))
    strategy = settings.strategy(opening(STEP_TIMES))
    plain = Settings(speedup=K / 5).strategy(opening(STEP_TIMES))
    assert strategy.policy == plain.policy and strategy.predictor.share == 0.5 and not strategy.notices
    assert plain.predictor is AUTO and strategy.name == plain.name + ", calibrated"
    scheduled = replace(settings, schedule=Schedule("fixed interval", cycle_length=2)).strategy(opening(STEP_TIMES))
    assert scheduled.predictor.share == 0.5 and not scheduled.notices
    far = replace(settings, schedule=Schedule("fixed interval", cycle_length=2)).strategy(opening([3.0, 2.0, 1.0, 0.5]))
    assert far.predictor is AUTO and "the calibration is not used" in far.notices[0]


@pytest.mark.parametrize("start", STARTS)
def test_mode_auto_takes_a_searched_plan_where_that_did_best(start):
    """From where its search began; the corrector it counts on is for Euler samplers alone."""
    forecast, general = forecast_of(), FrontLoaded(K / 4, tail=2)
    forecast = replace(forecast, choices=tuple(replace(choice, searched_from=start) for choice in forecast.choices))
    settings = Settings(speedup=K / 4, tail=2, calibration=calibration_of(forecast, None))
    strategy = settings.strategy(opening(STEP_TIMES))
    plan = strategy.policy.plan(K, range(K))
    assert plan == searched_plan(forecast, STEP_TIMES, range(K - 2), 4, start, True) != general.plan(K, range(K))
    assert plan.count(Kind.FULL) == 4 and plan[K - 2] is plan[K - 1] is Kind.FULL and strategy.name.endswith("x, calibrated")
    part = opening(STEP_TIMES, window=range(3, 8))
    windowed = settings.strategy(part).policy.plan(K, part.window)
    assert all(windowed[step] is Kind.FULL for step in (0, 1, 2, 7, 8))
    elsewhere = settings.strategy(opening(STEP_TIMES, is_euler=False))
    assert elsewhere.policy == general and elsewhere.predictor == strategy.predictor
    assert not strategy.notices and "is for the samplers euler and ddim" in elsewhere.notices[0]


@pytest.mark.parametrize(
    ("sampling", "is_followed"),
    [({}, True), *(({"sampler_name": name}, name in ("euler", "ddim")) for name in ("euler", "ddim", "heun", "euler_ancestral", "?", 3))],
    ids=str,
)
def test_the_page_shows_the_plan_that_will_run(sampling, is_followed):
    """Searched where the sampler on the canvas is Euler's, or none was found."""
    forecast = forecast_of()
    forecast = replace(forecast, choices=tuple(replace(choice, searched_from="general") for choice in forecast.choices))
    settings = Settings(speedup=K / 4, calibration=calibration_of(forecast, None))
    strategy = settings.strategy(_opening(Asked(settings, None, None, sampling, range(K), K, False)))
    expected = searched_plan(forecast, STEP_TIMES, range(K), 4, "general", True) if is_followed else FrontLoaded(K / 4).plan(K, range(K))
    assert strategy.policy.plan(K, range(K)) == expected


def test_a_calibration_that_was_no_better_says_so():
    """Where nothing of it surely was, when it was tried out."""
    forecast = forecast_of()
    forecast = replace(forecast, choices=tuple(replace(choice, share=None) for choice in forecast.choices))
    strategy = Settings(speedup=K / 5, calibration=calibration_of(forecast, None)).strategy(opening(STEP_TIMES))
    assert strategy.predictor is AUTO and strategy.name.endswith(", calibrated: does best as without") and not strategy.notices


def test_mode_auto_without_a_fitting_calibration_is_the_uncalibrated_setting():
    far = opening([3.0, 2.0, 1.0, 0.5])
    plain = Settings(speedup=2.0, tail=1).strategy(far)
    assert plain.policy == FrontLoaded(2.0, tail=1) and plain.predictor == AUTO and not plain.notices
    strategy = Settings(speedup=2.0, tail=1, calibration=calibration_of(forecast_of(), None)).strategy(far)
    assert strategy.notices and strategy == replace(plain, notices=strategy.notices)
    told = []
    run = CacheRun(strategy, far.timeline, far.window, FLUX, CPU, say=told.append)
    assert told == run.report.notices == list(strategy.notices) and "the calibration is not used" in told[0] and "3" in told[0]
    factors = Settings(speedup=2.0, tail=1, calibration=calibration_of(None, some_factors())).strategy(far)
    (notice,) = factors.notices
    assert factors == replace(plain, notices=(notice,)) and "the calibration is not used: it holds no forecast" in notice


# -- mode icc -----------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def icc(sites) -> Calibration:
    """Factors of rank 32 in the shapes of the demo model's layers."""
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
            Settings(mode="icc", calibration=calibration).strategy(opening(STEP_TIMES, network))


def test_mode_icc_refuses_the_factors_of_another_model(network):
    with pytest.raises(ValueError, match="another model"):
        Settings(mode="icc", calibration=calibration_of(None, some_factors())).strategy(opening(STEP_TIMES, network))


def test_mode_icc_takes_the_length_it_is_given(network, icc):
    strategy = Settings(mode="icc", cycle_length=4, warmup=2, tail=1, calibration=icc).strategy(opening(STEP_TIMES, network))
    assert strategy.policy == IccCycle(4, 2, 1) and strategy.linears.factors is icc.factors.tensors
    assert "ca_svd" in strategy.name and "every 4" in strategy.name


@pytest.mark.parametrize(("speedup", "steps"), [(1.2, 28), (1.5, 28), (2.0, 28), (2.4, 50), (9.0, 28)])
def test_mode_icc_follows_the_slider(network, icc, speedup, steps):
    """The shortest cycle that is fast enough. At rank 32 and width 256 a block's parts, of 4608 channels in and out together,
    cost 32·4608 of the dense 12·256² multiply-adds; attention is a tenth of a full evaluation more."""
    calibrated = 32 * 4608 / (12 * 256**2) + 0.1

    def speed(length: int) -> float:
        plan = IccCycle(length).plan(steps, range(steps))
        return steps / (plan.count(Kind.FULL) + calibrated * plan.count(Kind.CALIBRATED))

    times = np.linspace(1.0, 0.1, steps).tolist()
    length = Settings(mode="icc", speedup=speedup, calibration=icc).strategy(opening(times, network)).policy.interval
    assert speed(length) >= speedup * 0.98 or length == steps  # nine times is more than any cycle gives
    assert length > 1 and speed(length - 1) < speedup * 0.99

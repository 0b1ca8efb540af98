"""A calibration is the same after it was written and read, and its forecast agrees with float64."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core.calibration.__main__ import main
from comfyui_duca.cache_core.calibration.calibration import Calibration, Forecast
from comfyui_duca.cache_core.calibration.sidecar import Sidecar, read, write
from comfyui_duca.cache_core.calibration.statistics import ForecastModel
from helpers.calibrations import TIMES, TOKENS, D, N, R, calibration_of, features, forecast_of, model_of, orthonormal, some_factors

# -- the forecast against float64 ---------------------------------------------------------------------------------------------


def at(values, time):
    """Returns features at a time: interpolated linearly between recorded times and extrapolated outside of them."""
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
    """The reference stacks all tokens, and adds a row of damping for each anchor: a thousandth of its own mean square."""
    _, z = features()
    known = np.stack([at(z, anchor).ravel() for anchor in anchors], 1)
    damping = np.diag(np.sqrt(1e-3 * (known**2).sum(0)))
    target = np.concatenate((at(z, time).ravel(), np.zeros(len(anchors))))
    expected = np.linalg.lstsq(np.vstack((known, damping)), target, rcond=None)[0]
    assert near(model_of().least_squares(anchors, time), expected)


@pytest.mark.parametrize(("anchors", "time"), RUNS)
@pytest.mark.parametrize("own", [True, False], ids=["given weights", "best weights"])
def test_correction_and_errors_in_float64(anchors, time, own):
    """The correction is a regression between what `weights` leave of input and features. Errors are measured on the tokens themselves."""
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


def test_sensitivity_in_float64():
    """Sensitivity grows with the square of the time that a step lasts, and is never negative."""
    model = model_of()
    assert near(model.sensitivities(TIMES), [1.0, 3.0, 2.0, 5.0, 0.5, 1.5, 4.0])
    recorded = np.array([0.1, 0.15, 0.2, 0.15, 0.2, 0.1, 0.1])  # of TIMES, the last one down to 0
    density = model.sensitivity.numpy() / recorded**2
    for count in (3, 7, 20):
        times = np.linspace(1.0, 0.1, count)
        stretches = np.append(times[:-1] - times[1:], 0.1)
        expected = np.interp(times, TIMES[::-1], density[::-1]) * stretches**2
        assert near(model.sensitivities(times.tolist()), expected)
    assert model_of(None).sensitivities([0.8, 0.3]) == [1.0, 1.0]
    rising = model_of((1.0, 9.0, 2.0, 5.0, 0.5, 1.5, 4.0))  # from 100 to 400 per square of time: -50 at 1.05, which becomes 0
    assert near(rising.sensitivities([1.05, 1.02]), [0.0, (100 - 0.2 * 300) * 1.02**2])


# -- files --------------------------------------------------------------------------------------------------------------------


def single(model: ForecastModel) -> ForecastModel:
    """Returns the model with its tensors in the dtypes of a file."""
    return replace(model, uu=model.uu.float(), uz=model.uz.float(), basis=model.basis.float())


def through_a_file(calibration: Calibration, path: Path) -> Calibration:
    write(path, calibration.to_sidecar())
    return Calibration.from_sidecar(read(path))


def assert_same_forecast(a: Forecast, b: Forecast):
    assert (a.step_times, a.tried, a.model.times) == (b.step_times, b.tried, b.model.times)
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
        assert dict(back.factors.energy) == before.factors.energy  # each part's own, whatever the order in the file
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
    assert back.forecast.model.sensitivities(TIMES) == pytest.approx([1.0] * N)


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
    with pytest.raises(ValueError, match="made by a newer version"):
        Calibration.from_sidecar(read(tmp_path / "c"))


def test_a_plan_that_begins_with_a_skip_is_refused():
    whole = calibration_of(forecast_of(), None).to_sidecar()
    whole.sections["forecast"]["plans"][0, 0] = 0.0
    with pytest.raises(ValueError, match="first step"):
        Calibration.from_sidecar(Sidecar(whole.about, whole.fingerprint, whole.sections))


def test_a_search_that_is_not_known_is_refused():
    """A newer version might start its search elsewhere."""
    whole = calibration_of(forecast_of(), None).to_sidecar()
    whole.sections["forecast"]["results"][0, 3] = 3.0
    with pytest.raises(ValueError, match="made by a newer version"):
        Calibration.from_sidecar(Sidecar(whole.about, whole.fingerprint, whole.sections))

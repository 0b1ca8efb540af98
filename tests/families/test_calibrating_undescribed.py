"""A calibration of a model whose input no file describes: weights, plan and low-rank factors without the correction by the input."""

from __future__ import annotations

from dataclasses import replace

import folder_paths
import pytest
import torch
from comfyui_duca.cache_core import Plan, Settings
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.predictors import AUTO, Calibrated
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.cache_core.tuning.calibrate import Wishes
from comfyui_duca.nodes import host, sidecars
from comfyui_duca.nodes.sidecars.calibrating import Sampling, calibrate
from runs import STEPS, kinds, report_of, sample
from zoo import CASES

CASE = next(case for case in CASES if case.name == "ace_step")


@pytest.fixture(scope="module")
def model():
    return CASE.make()


@pytest.fixture(scope="module")
def calibration(model):
    sampling = Sampling([CASE.cond(1), CASE.cond(2)], [CASE.cond(3)] * 2, torch.zeros(1, *CASE.latent), "euler", "simple", STEPS, 2.0, 7)
    return calibrate(model, sampling, Wishes(method="cd_svd", rank=4, speedups=(2.0,)), "")


def error(result: torch.Tensor, plain: torch.Tensor) -> float:
    return float((result - plain).square().mean().sqrt() / plain.std())


def test_weights_are_learned_and_used(model, calibration):
    assert calibration.forecast.model.uu.shape[-1] == 0, "an input without channels"
    plain, plan = sample(CASE, model), "FFFaFaFa"
    errors = []
    for predictor in (AUTO, Calibrated(calibration.forecast.model, 1.0)):
        patched = host.attach(model, Strategy(Given(Plan.parse(plan)), predictor))
        errors.append(error(sample(CASE, patched), plain))
        assert kinds(patched) == plan and not report_of(patched).notices
        assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes
    assert errors[1] < errors[0]


def test_low_rank_factors_are_made_and_used(model, calibration):
    patched = host.attach(model, Settings(mode="icc", cycle_length=2, calibration=calibration))
    sample(CASE, patched)
    assert kinds(patched) == "FiFiFiFi" and not report_of(patched).notices


def test_its_file_is_found_for_the_same_checkpoint(model, calibration, tmp_path, monkeypatch):
    monkeypatch.setitem(folder_paths.folder_names_and_paths, sidecars.FOLDER, ([str(tmp_path)], {".safetensors"}))
    sidecars.save(calibration.to_sidecar())
    found = sidecars.find(CASE.make())
    assert found is not None
    patched = host.attach(model, Settings(speedup=2.0))
    sample(CASE, patched)
    assert report_of(patched).setting.startswith("auto 2x, calibrated")


def test_of_a_model_whose_input_was_described_it_is_not_used(model, calibration, monkeypatch):
    """As after a version of the pack that describes more, or less."""
    model_with_input = replace(calibration.forecast.model, uu=torch.zeros(STEPS, STEPS, 3, 3))
    described = replace(calibration, forecast=replace(calibration.forecast, model=model_with_input))
    patched = host.attach(model, Settings(speedup=2.0, calibration=described))
    sample(CASE, patched)
    assert report_of(patched).setting == "auto 2x" and any(
        "read this model's input differently" in text for text in report_of(patched).notices
    )

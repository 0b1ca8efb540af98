"""DuCa Cache uses the calibration that it finds or is given, if it fits."""

from __future__ import annotations

import os
from dataclasses import replace
from itertools import combinations

import folder_paths
import pytest
import torch
from comfyui_duca.cache_core import Kind
from comfyui_duca.cache_core.calibration.sidecar import read
from comfyui_duca.cache_core.strategy import MODES
from comfyui_duca.nodes import sidecars
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.duca_cache import DucaCache
from comfyui_duca.nodes.load_calibration import LoadCalibration
from comfyui_duca.nodes.sidecars import calibrations
from helpers.calibrator_calls import SMALL, cache, setting, without_finding
from helpers.sampling import last_report, load, perturbed, sample, with_lora

# -- DuCa Cache finds it -------------------------------------------------------------------------------


def test_duca_cache_finds_it_by_itself(kept, model, said):
    assert setting(model).startswith("auto 2x, calibrated")
    assert setting(with_lora(model)).startswith("auto 2x, calibrated")
    assert setting(load_demo_model(torch.bfloat16)).startswith("auto 2x, calibrated")
    assert "ICC cd_svd rank 8" in setting(model, mode="icc", speedup=1.2)
    assert not said


def test_with_a_lora_already_in_the_weights(kept, model):
    clone = with_lora(model)
    load(clone)
    assert setting(clone).startswith("auto 2x, calibrated")


def test_one_that_was_made_while_the_graph_existed(made, folder, model):
    cached = cache(model)
    sample(cached, **SMALL)
    assert last_report(cached).setting == "auto 2x"
    folder.mkdir()
    (folder / "new.safetensors").write_bytes(made)
    sample(cached, **SMALL)
    assert last_report(cached).setting.startswith("auto 2x, calibrated")
    (folder / "new.safetensors").unlink()
    sample(cached, **SMALL)
    assert last_report(cached).setting == "auto 2x"


@pytest.mark.parametrize(("place", "name"), [(sidecars.FOLDER, "a.safetensors"), ("diffusion_models", "a.duca.safetensors")])
def test_modes_that_look_run_again_when_a_file_comes_changes_or_goes(folder, tmp_path, monkeypatch, place, name):
    models = {sidecars.FOLDER: folder, "diffusion_models": tmp_path / "diffusion_models"}
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "diffusion_models", ([str(models["diffusion_models"])], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})

    def seen() -> dict:
        of = {mode: DucaCache.fingerprint_inputs(mode=mode, speedup=2.0) for mode in MODES}
        assert of == {mode: DucaCache.fingerprint_inputs(mode=mode) for mode in MODES}, "the same twice, whatever the speedup"
        assert of["auto"] == of["icc"] and of["paper"] == of["forecast"] == of["off"] == ()
        return of

    states = [seen()]
    for path in models.values():
        path.mkdir()
    assert seen() == states[0]
    file = models[place] / name
    for change in (lambda: file.write_bytes(b"1"), lambda: file.write_bytes(b"22"), lambda: os.utime(file, (1e9, 1e9)), file.unlink):
        change()
        states.append(seen())
    assert all(a["auto"] != b["auto"] for a, b in combinations(states[:-1], 2)) and states[-1] == states[0]


def test_other_schedules_are_covered_and_say_so(kept, model):
    cached = cache(model)
    sample(cached, steps=9, size=(16, 16))
    assert last_report(cached).setting.startswith("auto 2x, calibrated")


@pytest.mark.parametrize("mode", ["forecast", "paper", "off"])
def test_other_modes_do_not_look(kept, model, monkeypatch, mode):
    monkeypatch.setattr(calibrations, "find", lambda *a: pytest.fail("it looked"))
    sample(cache(model, mode=mode), **SMALL)


def test_another_checkpoints_is_not_found(kept, model, said):
    assert setting(perturbed(model)) == "auto 2x" and not said


# -- a calibration that is wired -------------------------------------------------------------------------


def test_an_explicit_one_is_used(kept, made, model, monkeypatch):
    calibration = LoadCalibration.execute(kept.name).result[0]
    kept.unlink()
    assert setting(model, calibration=calibration).startswith("auto 2x, calibrated")
    cached = cache(model, calibration, mode="icc", speedup=1.2)
    sample(cached, **SMALL)
    assert last_report(cached).count(Kind.INCREMENTAL) > 0 and last_report(cached).is_complete


def test_one_of_another_checkpoint_is_refused_before_sampling(kept, model, evaluations):
    calibration = LoadCalibration.execute(kept.name).result[0]
    perturbed(model)
    for mode in ("auto", "icc", "paper"):
        with pytest.raises(ValueError, match=r"'made' was made on another checkpoint .* connect the calibration of this checkpoint"):
            cache(model, calibration, mode=mode)
    assert cache(model, calibration, mode="off").wrappers == model.wrappers
    assert not evaluations


def test_mode_auto_with_only_factors_says_so_when_they_are_wired(kept, model, said):
    whole = read(kept)
    kept.unlink()
    path = sidecars.save(replace(whole, sections={"icc": whole.sections["icc"]}))
    for wired in (False, True):
        cached = cache(model, LoadCalibration.execute(path.name).result[0] if wired else None)
        assert torch.equal(sample(cached, **SMALL), without_finding(model))
        notices = [notice for notice in last_report(cached).notices if "calibration" in notice]
        assert last_report(cached).setting == "auto 2x" and len(notices) == wired and not said
    assert "the calibration is not used: it has only low-rank factors" in notices[0]


@pytest.mark.parametrize("wired", [False, True])
def test_mode_icc_without_factors_is_refused_before_the_first_evaluation(only_forecast, model, evaluations, wired):
    calibration = LoadCalibration.execute(only_forecast.name).result[0] if wired else None
    with pytest.raises(ValueError, match="needs low-rank factors of this model: run SVD Calibrator"):
        sample(cache(model, calibration, mode="icc"), **SMALL)
    assert not evaluations
    sample(model, **SMALL)
    assert evaluations

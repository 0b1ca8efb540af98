"""Fixtures for calibrations: a folder for sidecars, files in it, and stand-ins for the work of calibrating."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import comfy.model_management
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_duca.cache_core.calibration.sidecar import read
from comfyui_duca.cache_core.engine.linear_sites import linear_sites
from comfyui_duca.cache_core.tuning import tape
from comfyui_duca.nodes import sidecars, svd_calibrator
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.sidecars import calibrations
from helpers.calibrator_calls import made_file


@pytest.fixture(autouse=True)
def as_the_host_works() -> Iterator[None]:
    with torch.inference_mode():
        yield
    comfy.model_management.interrupt_current_processing(False)
    comfy.model_management.unload_all_models()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Returns the only folder where the host looks for sidecars. It does not exist yet."""
    path = tmp_path / "calibrations"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, sidecars.FOLDER, ([str(path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return path


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Returns a list that collects the notices about calibrations."""
    texts: list[str] = []
    for module in (calibrations, svd_calibrator):
        monkeypatch.setattr(module, "say", lambda text, node_id=None: texts.append(text))
    return texts


@pytest.fixture(scope="session")
def made(tmp_path_factory) -> bytes:
    """Returns the bytes of a calibration's file with both sections."""
    return made_file(tmp_path_factory.mktemp("made"))


@pytest.fixture
def kept(made, folder) -> Path:
    """Writes this file into the folder and returns its path."""
    folder.mkdir()
    path = folder / "made.safetensors"
    path.write_bytes(made)
    return path


@pytest.fixture
def only_forecast(kept) -> Path:
    whole = read(kept)
    kept.unlink()
    return sidecars.save(replace(whole, sections={"forecast": whole.sections["forecast"]}))


@pytest.fixture
def few_layers(monkeypatch) -> None:
    """Makes factors of four layers only, as all of them take seconds."""
    monkeypatch.setattr(tape, "linear_sites", lambda *given: linear_sites(*given)[:4])


@pytest.fixture
def at_once(made, tmp_path, monkeypatch) -> list[tuple]:
    """Replaces calibrating by a finished result. Returns a list that collects what was asked for."""
    (tmp_path / "given.safetensors").write_bytes(made)
    calibration, asked = calibrations.load(tmp_path / "given.safetensors"), []

    def calibrate(model, sampling, wishes, name, node_id):
        asked.append((sampling, wishes))
        return replace(calibration, about=replace(calibration.about, model_name=name or calibration.about.family))

    monkeypatch.setattr(svd_calibrator, "calibrate", calibrate)
    return asked


@pytest.fixture
def no_calibrating(monkeypatch) -> None:
    def instead(*_args, **_kwargs):
        raise AssertionError("nothing should be calibrated")

    monkeypatch.setattr(svd_calibrator, "calibrate", instead)


@pytest.fixture
def model() -> ModelPatcher:
    return load_demo_model()


@pytest.fixture
def evaluations(model, monkeypatch) -> list:
    """Returns a list that grows with every call of the network."""
    calls, forward = [], model.model.diffusion_model.forward
    monkeypatch.setattr(model.model.diffusion_model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    return calls

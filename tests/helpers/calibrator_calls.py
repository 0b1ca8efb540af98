"""Calls the calibration nodes as the host does, for their tests."""

from __future__ import annotations

import json
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfyui_duca.cache_core import Settings
from comfyui_duca.cache_core.calibration import low_rank
from comfyui_duca.cache_core.calibration.calibration import Calibration
from comfyui_duca.nodes import host, sidecars, svd_calibrator
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.duca_cache import DucaCache
from comfyui_duca.nodes.svd_calibrator import SvdCalibrator

from helpers.sampling import as_called, last_report, sample

ROOT = Path(__file__).resolve().parents[2]
SHIPPED = json.loads((ROOT / "workflows" / "api" / "duca_calibrate_demo.json").read_text())
PROMPTS = ("green apple", "dog face")
SMALL = {"steps": 6, "size": (16, 16)}


def calibrator(model: ModelPatcher, *, prompts=PROMPTS, negatives=("",), latent=None, is_plotted=False, **given) -> io.NodeOutput:
    """Runs SVD Calibrator as the host does: every input is a list."""
    values = {
        "sampler_name": "euler", "scheduler": "simple", "steps": 6, "cfg": 2.5, "what": "forecast", "icc_method": "cd_svd", "rank": 8,
        "first_seed": 100, "name": "", "recalibrate": False, **given,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        if not is_plotted:  # the plot takes a second
            patched.setattr(svd_calibrator, "calibration_plot", lambda calibration: torch.zeros(1, 8, 8, 3))
        return as_called(SvdCalibrator, "5").execute(
            model=[model] * len(prompts),
            positive=[encode_prompt(prompt) for prompt in prompts],
            negative=[encode_prompt(negative) for negative in negatives],
            latent=[{"samples": torch.zeros(1, 3, 16, 16) if latent is None else latent}],
            **{name: [value] for name, value in values.items()},
        )


def _roughly(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decomposed in no time."""
    u, s, v = torch.svd_lowrank(matrix, 8, niter=0)
    return u, s, v.T


def made_file(folder: Path) -> bytes:
    """The file of a calibration with both sections. folder: to work in."""
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        patched.setitem(folder_paths.folder_names_and_paths, sidecars.FOLDER, ([str(folder)], {".safetensors"}))
        patched.setattr(folder_paths, "temp_directory", str(folder / "temp"))
        patched.setattr(low_rank, "_exact_svd", _roughly)
        calibrator(load_demo_model(), what="both", name="made")
    (file,) = folder.glob("*.safetensors")
    return file.read_bytes()


def cache(model: ModelPatcher, calibration: Calibration | None = None, **given) -> ModelPatcher:
    """Returns the model that DuCa Cache gives out."""
    values = {
        "mode": "auto", "speedup": 2.0, "predictor": "chebyshev", "cycle_length": 0, "token_share": 0.1, "warmup": -1, "tail": 0,
        "start_percent": 0.0, "end_percent": 1.0, "store_device": "auto", "store_dtype": "model dtype", "token_seed": 0, "verbose": False,
        **({"calibration": calibration} if calibration is not None else {}), **given,
    }  # fmt: skip
    return as_called(DucaCache, "9").execute(model=model, **values).result[0]


def setting(model: ModelPatcher, **given) -> str:
    """Samples with DuCa Cache and returns the name of the setting in its report."""
    cached = cache(model, **given)
    sample(cached, **SMALL)
    return last_report(cached).setting


def without_finding(model: ModelPatcher, **settings) -> torch.Tensor:
    return sample(host.attach(model, Settings(**settings), host.HostOptions(finds_calibration=False)), **SMALL)

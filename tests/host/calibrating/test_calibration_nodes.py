"""SVD Calibrator, Load Calibration and Prompt List work on the host."""

from __future__ import annotations

import asyncio
import copy
import os
from dataclasses import replace

import comfy.model_management
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfyui_duca.cache_core import Kind
from comfyui_duca.cache_core.calibration.sidecar import SidecarError, read
from comfyui_duca.nodes import DucaExtension, sidecars
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.load_calibration import LoadCalibration
from comfyui_duca.nodes.page import notices
from comfyui_duca.nodes.prompt_list import PromptList
from helpers.calibrator_calls import PROMPTS, ROOT, SMALL, calibrator
from helpers.sampling import sample, with_lora

IDS = (
    "DuCaCache", "DuCaCacheSchedule", "DuCaCacheReport", "DuCaCacheCompare", "DuCaCacheSweep", "DuCaSVDCalibrator", "DuCaLoadCalibration",
    "DuCaPromptList", "DuCaDemoFlux", "DuCaLoadDiT", "DuCaImageNetClass",
)  # fmt: skip


# -- the nodes as the page sees them -------------------------------------------------------------------


def node_list() -> dict[str, type[io.ComfyNode]]:
    return {node.GET_SCHEMA().node_id: node for node in asyncio.run(DucaExtension().get_node_list())}


def test_the_nodes_ids_are_frozen_and_everything_is_explained():
    nodes = node_list()
    assert tuple(nodes) == IDS
    for name, node in nodes.items():
        info = node.GET_NODE_INFO_V1()
        assert info["description"] and info["display_name"] and all(info["output_tooltips"]), name
        for field, spec in {**info["input"].get("required", {}), **info["input"].get("optional", {})}.items():
            assert spec[1].get("tooltip"), f"{name}.{field} has no tooltip"


@pytest.mark.parametrize(
    ("name", "required", "optional"),
    [
        (
            "DuCaCache",
            ["model", "mode", "speedup", "predictor", "cycle_length", "token_share", "warmup", "tail", "start_percent", "end_percent",
             "store_device", "store_dtype", "token_seed", "verbose"],
            ["calibration", "schedule"],
        ),
        (
            "DuCaSVDCalibrator",
            ["model", "positive", "negative", "latent", "sampler_name", "scheduler", "steps", "cfg", "what", "icc_method", "rank",
             "first_seed", "name", "recalibrate"],
            [],
        ),
        (
            "DuCaCacheSchedule",
            ["kind", "speedup", "cycle_length", "text", "unit", "skip_from", "skip_to", "warmup", "tail", "several_evaluations"],
            ["calibration"],
        ),
        ("DuCaLoadCalibration", ["calibration_name"], []),
        ("DuCaPromptList", ["prompts"], []),
    ],
)  # fmt: skip
def test_saved_workflows_depend_on_this_order_of_inputs(name, required, optional):
    """The order is frozen, as saved workflows store widget values by position. Newer inputs are optional, last, and no widgets."""
    fields = node_list()[name].GET_NODE_INFO_V1()["input"]
    assert list(fields["required"]) == required and list(fields.get("optional", {})) == optional
    assert all(fields["optional"][field][0] in ("DUCA_CALIBRATION", "DUCA_SCHEDULE") for field in optional)


def test_the_page_folds_the_rare_inputs_of_these_nodes():
    script = (ROOT / "web" / "duca_advanced.js").read_text()
    for name, node in node_list().items():
        folded = [f for f, spec in node.GET_NODE_INFO_V1()["input"].get("required", {}).items() if spec[1].get("advanced")]
        assert bool(folded) == (f'"{name}"' in script), name


def test_prompts_are_the_lines():
    assert PromptList.execute(" a \n\n\tb\r\nc d\n \n").result[0] == ["a", "b", "c d"]
    assert PromptList.validate_inputs("a") is True and PromptList.validate_inputs(None) is True
    assert "at least one" in PromptList.validate_inputs(" \n")
    with pytest.raises(ValueError, match="at least one"):  # values that come by a link are not validated
        PromptList.execute(" \n")


# -- calibrating ---------------------------------------------------------------------------------------


def test_a_calibration_is_saved_and_shown(folder, model):
    before = sample(model, **SMALL)
    given = calibrator(model, name="FLUX/my model.safetensors", is_plotted=True)
    calibration, text, plot = given.result
    (path,) = folder.iterdir()
    assert path.name.startswith("my_model-") and path.name.endswith(".duca.safetensors")
    assert calibration.forecast is not None and calibration.factors is None
    assert [tried.plan.count(Kind.FULL) for tried in calibration.forecast.tried] == sorted(
        {tried.plan.count(Kind.FULL) for tried in calibration.forecast.tried}, reverse=True
    )
    assert all(line.startswith("    ") for line in text.splitlines()) and text.split()[0] == "calibrated"
    assert str(path) in text and "2 prompts, 6 steps euler/simple, cfg 2.5, latent 16 x 16" in text and "FLUX/my model" in text
    assert plot.ndim == 4 and plot.shape[0] == 1 and plot.shape[-1] == 3 and 0 <= plot.min() < plot.max() <= 1
    assert given.ui["images"] and given.ui["text"][0].split() == text.split()
    about = read(path).about
    assert (about.seeds, about.prompt_count, about.rank, about.method) == ((100, 101), 2, 0, "")
    assert torch.equal(before, sample(model, **SMALL)), "the model samples as before"


def test_what_is_there_is_used(kept, model, no_calibrating):
    """Also with other settings: a user who wants a new one says so."""
    for given in ({"what": "forecast"}, {"what": "ICC"}, {"what": "both", "steps": 9, "cfg": 1.0}, {"rank": 3, "what": "forecast"}):
        calibration, text, _ = calibrator(model, **given).result
        assert text.split()[0] == "calibration" and str(kept) in text
        assert calibration.forecast is not None and calibration.factors is not None


def test_recalibrate_makes_a_new_one(kept, model):
    forecast = read(kept).sections["forecast"]
    calibration, text, _ = calibrator(model, steps=4, prompts=PROMPTS[:1], recalibrate=True, name="made").result
    new = next(path for path in kept.parent.iterdir() if path != kept)
    assert text.split()[0] == "calibrated" and str(new) in text and calibration.about.steps == 4
    assert sorted(read(new).sections) == ["forecast", "icc"], "what was not asked for is kept"
    assert read(new).sections["forecast"]["plans"].shape != forecast["plans"].shape
    os.utime(new, (4e9, 4e9))  # both may be created within one second
    assert sidecars.find(model).path == new


@pytest.mark.parametrize("method", ["svd", "ca_svd"])
def test_a_missing_section_is_added_to_the_same_file(only_forecast, model, few_layers, method):
    before = read(only_forecast)
    calibration, text, _ = calibrator(model, what="ICC", icc_method=method, steps=4, cfg=1.0, prompts=PROMPTS[:1]).result
    after = read(only_forecast)
    assert list(only_forecast.parent.iterdir()) == [only_forecast] and str(only_forecast) in text
    assert set(after.sections) == {"forecast", "icc"} and calibration.forecast is not None and calibration.factors is not None
    assert all(torch.equal(tensor, after.sections["forecast"][name]) for name, tensor in before.sections["forecast"].items())
    assert after.about == replace(before.about, method=method, rank=8, created=after.about.created)
    assert method in text and "rank 8" in text


def test_factors_of_another_kind_are_made_anew_and_the_forecast_is_kept(kept, model, few_layers, said):
    before = read(kept)
    calibration = calibrator(model, what="ICC", icc_method="svd", rank=4, steps=4, prompts=PROMPTS[:1], name="made").result[0]
    assert (calibration.about.method, calibration.about.rank) == ("svd", 4)
    assert calibration.about.steps == before.about.steps and calibration.forecast is not None
    assert {min(tensor.shape) for tensor in calibration.factors.tensors.values()} == {4} and not said


def test_it_is_of_the_checkpoint_whatever_lora_is_on_it(folder, model, few_layers):
    calibrator(with_lora(model), what="ICC", icc_method="svd", prompts=PROMPTS[:1], steps=4)
    (path,) = folder.iterdir()
    assert read(path).fingerprint.matches(sidecars.fingerprint_of(load_demo_model()))


def state_of(model: ModelPatcher) -> dict:
    """Returns the attributes of every module, which show overrides and hooks."""
    return {
        name: (module.__dict__.get("forward"), sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.model.diffusion_model.named_modules()
    }


@pytest.mark.parametrize(
    ("stage", "what"),
    [("recording 1", "both"), ("measuring sensitivity 1", "forecast"), ("trying out 3", "forecast"), ("factorising layers 2", "ICC")],
)
def test_a_cancel_ends_it_at_once_and_leaves_nothing(folder, model, few_layers, monkeypatch, stage, what):
    before = sample(model, **SMALL)
    state, wrappers = state_of(model), copy.deepcopy(model.wrappers)
    shown: list[str] = []

    def show(text: str, node_id: str | None) -> None:
        assert node_id == "5"
        shown.append(text)
        if text.startswith(stage):
            comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(notices, "show", show)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrator(model, what=what)
    assert shown[-1].startswith(stage), "nothing went on after it"
    assert not folder.exists() or not list(folder.iterdir())
    assert state_of(model) == state and model.wrappers == wrappers
    assert torch.equal(before, sample(model, **SMALL))


def test_progress_never_goes_back_and_names_its_stages(folder, model, few_layers, monkeypatch):
    shown, bar = [], []
    monkeypatch.setattr(notices, "show", lambda text, node_id: shown.append(text))
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, value, *a: bar.append(value / self.total))
    calibrator(model, what="both", steps=4, icc_method="svd", prompts=PROMPTS[:1])
    stages = list(dict.fromkeys(text.split(" of ")[0].rstrip("0123456789 ") for text in shown))
    assert stages == ["recording", "measuring sensitivity", "trying out", "factorising layers"]
    assert bar == sorted(bar) and bar[0] == 0 and bar[-1] == 1


# -- Load Calibration ----------------------------------------------------------------------------------


def test_loading_one(kept):
    assert LoadCalibration.GET_NODE_INFO_V1()["input"]["required"]["calibration_name"][1]["options"] == [kept.name]
    calibration, text, plot = LoadCalibration.execute(kept.name).result
    assert calibration.forecast is not None and calibration.factors is not None
    assert text.split()[:2] == ["calibration", "made"] and "cd_svd, rank 8" in text and plot.shape[-1] == 3
    first = LoadCalibration.fingerprint_inputs(kept.name)
    assert first == LoadCalibration.fingerprint_inputs(kept.name)
    os.utime(kept, (1e9, 1e9))
    assert first != LoadCalibration.fingerprint_inputs(kept.name)


def test_loading_what_cannot_be(kept):
    kept.write_bytes(kept.read_bytes()[:-5])
    with pytest.raises(SidecarError, match=r"made\.safetensors.*damaged"):
        LoadCalibration.execute(kept.name)
    kept.unlink()
    for name in (kept.name, "../../etc/passwd", ""):
        with pytest.raises(FileNotFoundError):
            LoadCalibration.execute(name)

"""SVD Calibrator, Load Calibration and Prompt List on the real host, and what DuCa Cache makes of what they leave."""

from __future__ import annotations

import asyncio
import copy
import errno
import json
import os
import struct
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import aiohttp
import comfy.model_management
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy_api.latest import io
from comfyui_duca.cache_core import Kind, Settings
from comfyui_duca.cache_core.calibration import low_rank
from comfyui_duca.cache_core.calibration.calibration import Calibration
from comfyui_duca.cache_core.calibration.sidecar import SidecarError, peek, read
from comfyui_duca.cache_core.engine.linear_sites import find_linears
from comfyui_duca.cache_core.tuning import calibrate as tuning
from comfyui_duca.nodes import DucaExtension, calibrating, calibrations, host, sidecars, svd_calibrator
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.duca_cache import DucaCache
from comfyui_duca.nodes.load_calibration import LoadCalibration
from comfyui_duca.nodes.prompt_list import PromptList
from comfyui_duca.nodes.svd_calibrator import SvdCalibrator
from host import last_report, sample
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_sidecars_on_host import load, perturbed, with_lora
from test_wrong_input import unet, unknown_dit

from devtools.client import ComfyClient, PromptError
from devtools.server import ComfyServer

ROOT = Path(__file__).resolve().parents[1]
SHIPPED = json.loads((ROOT / "workflows" / "api" / "duca_calibrate_demo.json").read_text())
PROMPTS = ("green apple", "dog face")
SMALL = {"steps": 6, "size": (16, 16)}
IDS = ("DuCaCache", "DuCaCacheReport", "DuCaSVDCalibrator", "DuCaLoadCalibration", "DuCaPromptList", "DuCaDemoFlux")


@pytest.fixture(autouse=True)
def as_the_host_works() -> Iterator[None]:
    with torch.inference_mode():
        yield
    comfy.model_management.interrupt_current_processing(False)
    comfy.model_management.unload_all_models()


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Where sidecars are, and the only place. Does not exist yet."""
    path = tmp_path / "calibrations"
    monkeypatch.setitem(folder_paths.folder_names_and_paths, sidecars.FOLDER, ([str(path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    return path


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """What the user is told of calibrations."""
    texts: list[str] = []
    for module in (calibrations, svd_calibrator):
        monkeypatch.setattr(module, "say", lambda text, node_id=None: texts.append(text))
    return texts


def calibrator(model: ModelPatcher, *, prompts=PROMPTS, negatives=("",), latent=None, is_plotted=False, **given) -> io.NodeOutput:
    """The node as the host calls it: every input is a list."""
    values = {
        "sampler_name": "euler", "scheduler": "simple", "steps": 6, "cfg": 2.5, "what": "forecast", "icc_method": "cd_svd", "rank": 8,
        "tries": 0, "first_seed": 100, "name": "", "recalibrate": False, **given,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patched:
        if not is_plotted:  # which takes a second
            patched.setattr(svd_calibrator, "calibration_plot", lambda calibration: torch.zeros(1, 8, 8, 3))
        return SvdCalibrator.PREPARE_CLASS_CLONE({io.Hidden.unique_id: "5"}).execute(
            model=[model] * len(prompts),
            positive=[encode_prompt(prompt) for prompt in prompts],
            negative=[encode_prompt(negative) for negative in negatives],
            latent=[{"samples": torch.zeros(1, 3, 16, 16) if latent is None else latent}],
            **{name: [value] for name, value in values.items()},
        )


def cache(model: ModelPatcher, calibration: Calibration | None = None, **given) -> ModelPatcher:
    """What DuCa Cache gives out."""
    values = {
        "mode": "auto", "speedup": 2.0, "predictor": "chebyshev", "cycle_length": 0, "token_share": 0.1, "warmup": -1, "tail": 0,
        "start_percent": 0.0, "end_percent": 1.0, "store_device": "auto", "store_dtype": "model dtype", "token_seed": 0, "verbose": False,
        **({"calibration": calibration} if calibration is not None else {}), **given,
    }  # fmt: skip
    return DucaCache.PREPARE_CLASS_CLONE({io.Hidden.unique_id: "9"}).execute(model=model, **values).result[0]


def setting(model: ModelPatcher, **given) -> str:
    """What the report of a sampling with DuCa Cache calls it."""
    cached = cache(model, **given)
    sample(cached, **SMALL)
    return last_report(cached).setting


def without_finding(model: ModelPatcher, **settings) -> torch.Tensor:
    return sample(host.attach(model, Settings(**settings), host.HostOptions(finds_calibration=False)), **SMALL)


def roughly(matrix: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decomposed in no time."""
    u, s, v = torch.svd_lowrank(matrix, 8, niter=0)
    return u, s, v.T


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> bytes:
    """A calibration's file, with both sections."""
    path = tmp_path_factory.mktemp("made")
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        patched.setitem(folder_paths.folder_names_and_paths, sidecars.FOLDER, ([str(path)], {".safetensors"}))
        patched.setattr(folder_paths, "temp_directory", str(path / "temp"))
        patched.setattr(low_rank, "_exact_svd", roughly)
        calibrator(load_demo_model(), what="both", name="made")
    (file,) = path.glob("*.safetensors")
    return file.read_bytes()


@pytest.fixture
def kept(made, folder) -> Path:
    """It in the folder."""
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
    """Of which factors are made: all of them take seconds."""
    monkeypatch.setattr(tuning, "find_linears", lambda family, network: find_linears(family, network)[:4])


@pytest.fixture
def at_once(made, tmp_path, monkeypatch) -> list[tuple]:
    """What calibrating gives, without the work, and what it was asked for."""
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
    """Grows with every call of the network."""
    calls, forward = [], model.model.diffusion_model.forward
    monkeypatch.setattr(model.model.diffusion_model, "forward", lambda *a, **k: calls.append(1) or forward(*a, **k))
    return calls


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
            ["calibration"],
        ),
        (
            "DuCaSVDCalibrator",
            ["model", "positive", "negative", "latent", "sampler_name", "scheduler", "steps", "cfg", "what", "icc_method", "rank", "tries",
             "first_seed", "name", "recalibrate"],
            [],
        ),
        ("DuCaLoadCalibration", ["calibration_name"], []),
        ("DuCaPromptList", ["prompts"], []),
    ],
)  # fmt: skip
def test_saved_workflows_depend_on_this_order_of_inputs(name, required, optional):
    """Frozen: widget values in saved workflows are stored by position. What came later is optional, last and no widget."""
    fields = node_list()[name].GET_NODE_INFO_V1()["input"]
    assert list(fields["required"]) == required and list(fields.get("optional", {})) == optional
    assert all(fields["optional"][field][0] == "DUCA_CALIBRATION" for field in optional)


def test_the_page_folds_the_rare_inputs_of_these_nodes():
    script = (ROOT / "web" / "duca_advanced.js").read_text()
    for name, node in node_list().items():
        folded = [f for f, spec in node.GET_NODE_INFO_V1()["input"].get("required", {}).items() if spec[1].get("advanced")]
        assert bool(folded) == (f'"{name}"' in script), name


def test_prompts_are_the_lines():
    assert PromptList.execute(" a \n\n\tb\r\nc d\n \n").result[0] == ["a", "b", "c d"]
    assert PromptList.validate_inputs("a") is True and PromptList.validate_inputs(None) is True
    assert "at least one" in PromptList.validate_inputs(" \n")
    with pytest.raises(ValueError, match="at least one"):  # what comes by link is not validated
        PromptList.execute(" \n")


# -- calibrating ---------------------------------------------------------------------------------------


def test_a_calibration_is_saved_and_shown(folder, model):
    before = sample(model, **SMALL)
    given = calibrator(model, name="FLUX/my model.safetensors", is_plotted=True)
    calibration, text, plot = given.result
    (path,) = folder.iterdir()
    assert path.name.startswith("my_model-") and path.name.endswith(".duca.safetensors")
    assert calibration.forecast is not None and calibration.factors is None
    assert [choice.plan.count(Kind.FULL) for choice in calibration.forecast.choices] == sorted(
        {choice.plan.count(Kind.FULL) for choice in calibration.forecast.choices}, reverse=True
    )
    assert all(line.startswith("    ") for line in text.splitlines()) and text.split()[0] == "calibrated"
    assert str(path) in text and "2 prompts, 6 steps euler/simple, cfg 2.5, latent 16 x 16" in text and "FLUX/my model" in text
    assert plot.ndim == 4 and plot.shape[0] == 1 and plot.shape[-1] == 3 and 0 <= plot.min() < plot.max() <= 1
    assert given.ui["images"] and given.ui["text"][0].split() == text.split()
    about = read(path).about
    assert (about.seeds, about.prompt_count, about.rank, about.method) == ((100, 101), 2, 0, "")
    assert torch.equal(before, sample(model, **SMALL)), "the model samples as before"


def test_what_is_there_is_used(kept, model, no_calibrating):
    """With other settings too: whoever wants it anew says so."""
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
    os.utime(new, (4e9, 4e9))  # created within the same second as the other
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
    """What hangs on every module: overrides and hooks show here."""
    return {
        name: (module.__dict__.get("forward"), sorted(module.__dict__), len(module._forward_hooks), len(module._forward_pre_hooks))
        for name, module in model.model.diffusion_model.named_modules()
    }


@pytest.mark.parametrize(
    ("stage", "what"),
    [("recording 1", "both"), ("measuring sensitivity 1", "forecast"), ("trying plans 3", "forecast"), ("factorising layers 2", "ICC")],
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

    monkeypatch.setattr(calibrating.notices, "show", show)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        calibrator(model, what=what)
    assert shown[-1].startswith(stage), "nothing went on after it"
    assert not folder.exists() or not list(folder.iterdir())
    assert state_of(model) == state and model.wrappers == wrappers
    assert torch.equal(before, sample(model, **SMALL))


def test_progress_never_goes_back_and_names_its_stages(folder, model, few_layers, monkeypatch):
    shown, bar = [], []
    monkeypatch.setattr(calibrating.notices, "show", lambda text, node_id: shown.append(text))
    monkeypatch.setattr(calibrating.comfy.utils.ProgressBar, "update_absolute", lambda self, value, *a: bar.append(value / self.total))
    calibrator(model, what="both", steps=4, icc_method="svd", prompts=PROMPTS[:1])
    stages = list(dict.fromkeys(text.split(" of ")[0].rstrip("0123456789 ") for text in shown))
    assert stages == ["recording", "measuring sensitivity", "trying plans", "factorising layers"]
    assert bar == sorted(bar) and bar[0] == 0 and bar[-1] == 1


# -- DuCa Cache finds it -------------------------------------------------------------------------------


def test_duca_cache_finds_it_by_itself(kept, model, said):
    assert setting(model) == "auto 2x, calibrated"
    assert setting(with_lora(model)) == "auto 2x, calibrated"
    assert setting(load_demo_model(torch.bfloat16)) == "auto 2x, calibrated"
    assert "ICC cd_svd rank 8" in setting(model, mode="icc", speedup=1.2)
    assert not said


def test_with_a_lora_already_in_the_weights(kept, model):
    clone = with_lora(model)
    load(clone)
    assert setting(clone) == "auto 2x, calibrated"


def test_one_that_was_made_while_the_graph_existed(made, folder, model):
    cached = cache(model)
    sample(cached, **SMALL)
    assert last_report(cached).setting == "auto 2x"
    folder.mkdir()
    (folder / "new.safetensors").write_bytes(made)
    sample(cached, **SMALL)
    assert last_report(cached).setting == "auto 2x, calibrated"
    (folder / "new.safetensors").unlink()
    sample(cached, **SMALL)
    assert last_report(cached).setting == "auto 2x"


def test_other_schedules_are_covered_and_say_so(kept, model):
    cached = cache(model)
    sample(cached, steps=9, size=(16, 16))
    assert last_report(cached).setting == "auto 2x, calibrated (for another schedule)"


@pytest.mark.parametrize("mode", ["forecast", "paper", "off"])
def test_other_modes_do_not_look(kept, model, monkeypatch, mode):
    monkeypatch.setattr(sidecars, "find", lambda *a: pytest.fail("it looked"))
    sample(cache(model, mode=mode), **SMALL)


def test_another_checkpoints_is_not_found(kept, model, said):
    assert setting(perturbed(model)) == "auto 2x" and not said


# -- an explicit one -----------------------------------------------------------------------------------


def test_an_explicit_one_is_used(kept, made, model, monkeypatch):
    calibration = LoadCalibration.execute(kept.name).result[0]
    kept.unlink()
    assert setting(model, calibration=calibration) == "auto 2x, calibrated"
    cached = cache(model, calibration, mode="icc", speedup=1.2)
    sample(cached, **SMALL)
    assert last_report(cached).count(Kind.CALIBRATED) > 0 and last_report(cached).is_complete


def test_one_of_another_checkpoint_is_refused_before_sampling(kept, model, evaluations):
    calibration = LoadCalibration.execute(kept.name).result[0]
    perturbed(model)
    for mode in ("auto", "icc", "paper"):
        with pytest.raises(ValueError, match=r"'made' was made on another checkpoint .* load the one that belongs to it, or calibrate"):
            cache(model, calibration, mode=mode)
    assert cache(model, calibration, mode="off").wrappers == model.wrappers
    assert not evaluations


@pytest.mark.parametrize("wired", [False, True])
def test_mode_icc_without_factors_is_refused_before_the_first_evaluation(only_forecast, model, evaluations, wired):
    calibration = LoadCalibration.execute(only_forecast.name).result[0] if wired else None
    with pytest.raises(ValueError, match="needs low-rank factors of this model: run SVD Calibrator"):
        sample(cache(model, calibration, mode="icc"), **SMALL)
    assert not evaluations
    sample(model, **SMALL)
    assert evaluations


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


# -- faults --------------------------------------------------------------------------------------------


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def flipped(section: str) -> Callable[[Path], None]:
    """One bit within a tensor of that section, which only reading it tells."""

    def flip(path: Path) -> None:
        with safe_open(path, "pt") as file:
            name = next(key for key in sorted(file.keys()) if key.startswith(section))
            needle = bytes(file.get_tensor(name).contiguous().view(torch.uint8).numpy().tobytes())[:64]
        content = bytearray(path.read_bytes())
        content[content.rindex(needle) + 5] ^= 1
        path.write_bytes(content)

    return flip


def newer(path: Path) -> None:
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(path), path, metadata | {"duca_format": "2"})


def flipped_header(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[content.index(b"euler")] ^= 1
    path.write_bytes(content)


FAULTS = {
    "truncated": (truncated, "damaged"),
    "a bit of the header": (flipped_header, "damaged"),
    "a bit of the fingerprint": (flipped("fingerprint"), "damaged"),
    "a bit of the forecast": (flipped("forecast"), "forecast.basis is damaged"),
    "newer": (newer, "update the pack"),
}


@pytest.mark.parametrize(("spoil", "words"), FAULTS.values(), ids=FAULTS)
def test_a_file_that_cannot_be_used_is_told_once_and_ends_nothing(kept, model, said, spoil, words):
    spoil(kept)
    cached = cache(model)
    latents = [sample(cached, **SMALL) for _ in range(2)]
    assert last_report(cached).setting == "auto 2x"
    assert torch.equal(latents[0], without_finding(model)) and torch.equal(*latents)
    assert len(said) == 1 and words in said[0] and "made.safetensors cannot be used" in said[0] and said[0].endswith(".")
    assert str(kept.parent) not in said[0], "the name is enough"


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), PermissionError(errno.EACCES, "Permission denied")])
def test_a_file_that_cannot_be_read_is_told_once_and_ends_nothing(kept, model, said, monkeypatch, error):
    real = Path.open

    def failing(path: Path, *args, **kwargs):
        if path.name == kept.name:
            raise error
        return real(path, *args, **kwargs)

    monkeypatch.setattr(Path, "open", failing)
    cached = cache(model)
    latents = [sample(cached, **SMALL) for _ in range(2)]
    assert torch.equal(latents[0], without_finding(model)) and torch.equal(*latents)
    assert len(said) == 1 and error.strerror in said[0]


def test_a_model_without_weights_to_know_it_by(kept, model, said, monkeypatch):
    """Packed by something unknown, for example."""
    monkeypatch.setattr(sidecars, "_base_weights", lambda model: {})
    assert setting(model) == "auto 2x"
    assert len(said) == 1 and "no weights" in said[0]


def test_mode_icc_says_why_when_its_file_is_damaged(kept, model, said):
    flipped("icc")(kept)
    assert setting(model) == "auto 2x, calibrated" and not said
    with pytest.raises(ValueError, match="needs low-rank factors"):
        setting(model, mode="icc")
    assert len(said) == 1 and "damaged" in said[0]


@pytest.mark.parametrize(("spoil", "words"), FAULTS.values(), ids=FAULTS)
def test_a_damaged_file_does_not_keep_from_calibrating(kept, model, said, at_once, spoil, words):
    spoil(kept)
    os.utime(kept, (1e9, 1e9))
    given = calibrator(model, what="ICC")
    assert given.result[1].split()[0] == "calibrated" and len(said) == 1 and words in said[0]
    assert calibrations.find(model, "icc", lambda text: None)[0] != kept and at_once


@pytest.mark.parametrize(
    ("where", "error", "words"),
    [
        ("os.fsync", OSError(errno.ENOSPC, "No space left on device"), "make room"),
        ("pathlib.Path.replace", PermissionError(errno.EACCES, "Permission denied"), "allow writing"),
    ],
)
def test_saving_that_fails_tells_why_and_keeps_the_old_file(folder, model, monkeypatch, at_once, where, error, words):
    calibrator(model)
    (path,) = folder.iterdir()
    before = path.read_bytes()

    def failing(*_args, **_kwargs):
        raise error

    with monkeypatch.context() as patched:
        patched.setattr(where, failing)
        with pytest.raises(SidecarError, match=f"not written: {error.strerror}.*{words}"):
            calibrator(model, recalibrate=True)
    assert path.read_bytes() == before and list(folder.iterdir()) == [path]


def test_a_folder_that_cannot_be_made(folder, model, at_once):
    folder.write_text("a file where the folder should be")
    with pytest.raises(SidecarError, match="not written"):
        calibrator(model)
    assert folder.is_file()


# -- bad input -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("make", "words"), [(unet, "UNetModel"), (unknown_dit, "Hunyuan3Dv2")])
def test_models_that_cannot_be_calibrated(folder, make, words):
    with pytest.raises(ValueError, match=f"does not know the model {words}"):
        calibrator(make())
    assert not folder.exists()


@pytest.mark.parametrize(
    ("prompts", "negatives", "paired"),
    [(3, 1, [0, 0, 0]), (3, 2, [0, 1, 1]), (2, 2, [0, 1]), (1, 3, [0])],
)
def test_negatives_as_the_host_pairs_lists(folder, model, at_once, prompts, negatives, paired):
    """The last one is repeated, and what is too many is left."""
    texts = [f"negative {i}" for i in range(negatives)]
    calibrator(model, prompts=["p"] * prompts, negatives=texts)
    sampling, _ = at_once[0]
    assert len(sampling.positives) == prompts
    assert all(torch.equal(a[0][0], encode_prompt(texts[i])[0][0]) for a, i in zip(sampling.negatives, paired, strict=True))


def test_latents_of_other_channels(folder, model, few_layers):
    """An empty one is given the model's, as the host does; a picture of another model's is none of this one's."""
    calibration = calibrator(model, what="ICC", icc_method="svd", steps=4, prompts=PROMPTS[:1], latent=torch.zeros(2, 4, 16, 16)).result[0]
    assert calibration.about.token_grid == (16, 16)
    before = list(folder.iterdir())
    with pytest.raises((RuntimeError, ValueError)):
        calibrator(model, latent=torch.ones(1, 4, 16, 16), recalibrate=True)
    assert list(folder.iterdir()) == before


@pytest.mark.parametrize("what", ["forecast", "both"])
def test_steps_of_which_none_can_be_skipped(folder, model, what):
    """By link, past the widget's limit."""
    with pytest.raises(ValueError, match=r"nothing to skip: calibrate with more|two evaluations of one run"):
        calibrator(model, steps=1, what=what)
    assert not folder.exists()


@pytest.mark.parametrize("wrong", [{"what": "all"}, {"icc_method": "pca"}])
def test_choices_that_there_are_not(folder, model, evaluations, wrong):
    """The host does not check them."""
    with pytest.raises(ValueError, match="unknown"):
        calibrator(model, **wrong)
    assert not evaluations and not folder.exists()


@pytest.mark.parametrize("name", ["../../outside", "C:\\con", "/etc/passwd", "a/b/c.safetensors", "\0", "x" * 400, "日本"])
def test_names_stay_in_the_folder(folder, model, at_once, name):
    calibrator(model, name=name)
    (path,) = folder.iterdir()
    assert path.parent == folder and peek(path).about.model_name == name
    assert calibrator(model).result[1].split()[0] == "calibration" and len(at_once) == 1


def test_a_sampler_that_goes_back(folder, model):
    with pytest.raises(ValueError, match="goes back to higher noise levels"):
        calibrator(model, sampler_name="heunpp2", prompts=PROMPTS[:1])
    assert not folder.exists()


# -- through the server --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory) -> Iterator[tuple[ComfyClient, Path, ComfyServer]]:
    """A server with a folder of its own for calibrations, told as a user does."""
    base = tmp_path_factory.mktemp("server")
    folder = base / "calibrations"
    (base / "paths.yaml").write_text(f"tests:\n  {sidecars.FOLDER}: {folder}\n")
    with ComfyServer(
        sys.executable, os.environ["COMFYUI_PATH"], ROOT / ".dev" / "base", base / "server.log",
        arguments=("--extra-model-paths-config", str(base / "paths.yaml")),
    ) as running:  # fmt: skip
        yield ComfyClient(running.url), folder, running


@pytest.fixture
def empty(served) -> Path:
    """The server's folder, with nothing in it."""
    folder = served[1]
    for path in folder.glob("*"):
        path.unlink()
    return folder


def graph(cache: dict | None = None, **calibrate) -> dict:
    """The shipped prompt, made short."""
    prompt = copy.deepcopy(SHIPPED)
    by_class = {value["class_type"]: value["inputs"] for value in prompt.values()}
    by_class["DuCaPromptList"]["prompts"] = "\n".join(PROMPTS)
    by_class["EmptyChromaRadianceLatentImage"].update(width=16, height=16)
    by_class["DuCaSVDCalibrator"].update({"steps": 6, "tries": 0, "rank": 8, **calibrate})
    by_class["KSampler"].update(steps=6)
    by_class["DuCaCache"].update({"speedup": 2.0, **(cache or {})})
    return prompt


def key(class_type: str) -> str:
    return next(key for key, value in SHIPPED.items() if value["class_type"] == class_type)


async def _watched(url: str, prompt: dict, interrupt_at: str | None) -> tuple[list[str], list[dict], float]:
    """Texts under the calibrator, messages, and the seconds from the interrupt to the end."""
    client, texts, messages, asked = uuid.uuid4().hex, [], [], 0.0
    async with aiohttp.ClientSession() as session, session.ws_connect(f"{url}/ws?clientId={client}", max_msg_size=0) as socket:
        async with session.post(f"{url}/prompt", json={"prompt": prompt, "client_id": client}) as answer:
            assert answer.status == 200, await answer.text()
        async for message in socket:
            if message.type is aiohttp.WSMsgType.BINARY:
                kind, length = struct.unpack(">II", message.data[:8])
                if kind == 3 and message.data[8 : 8 + length].decode() == key("DuCaSVDCalibrator"):
                    texts.append(message.data[8 + length :].decode())
                if interrupt_at is not None and not asked and texts and texts[-1].startswith(interrupt_at):
                    asked = time.monotonic()
                    async with session.post(f"{url}/interrupt") as answer:
                        assert answer.status == 200
            elif message.type is aiohttp.WSMsgType.TEXT:
                messages.append(message.json())
                if messages[-1]["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                    return texts, messages, time.monotonic() - asked
    raise AssertionError("the server closed the connection")


def watched(client: ComfyClient, prompt: dict, interrupt_at: str | None = None) -> tuple[list[str], list[dict], float]:
    return asyncio.run(_watched(client._url, prompt, interrupt_at))


def setting_of(outputs: dict) -> str:
    return outputs[key("DuCaCacheReport")]["duca_cache_report"][0]["setting"]


def test_the_shipped_graph_on_the_server(served, empty):
    client, _, server = served
    started = len(server.log_tail(10**6))
    texts, messages, _ = watched(client, graph())
    assert messages[-1]["type"] == "execution_success", messages[-1]
    for stage in ("recording", "measuring sensitivity", "trying plans"):
        assert any(text.startswith(stage) for text in texts), stage
    told = [m["data"] for m in messages if m["type"] == "progress" and m["data"]["node"] == key("DuCaSVDCalibrator")]
    assert told and [m["value"] for m in told] == sorted(m["value"] for m in told)
    (path,) = empty.iterdir()
    assert texts[-1] == f"saved as {path.name}"
    (loader,) = client.get("/object_info/DuCaLoadCalibration").values()
    assert path.name in loader["input"]["required"]["calibration_name"][1]["options"]
    written = path.stat().st_mtime_ns

    again = client.run(graph())
    assert key("DuCaSVDCalibrator") not in again.seconds and path.stat().st_mtime_ns == written, "remembered by the host"
    shown = again.outputs[key("DuCaSVDCalibrator")]
    assert shown["text"][0].startswith("calibrated  flux") and str(path) in shown["text"][0]
    assert client.image(shown["images"][0])[:4] == b"\x89PNG"
    assert setting_of(again.outputs) == "auto 2x, calibrated"

    found = client.run(graph(first_seed=7))
    assert key("DuCaSVDCalibrator") in found.seconds and path.stat().st_mtime_ns == written
    assert found.outputs[key("DuCaSVDCalibrator")]["text"][0].startswith("calibration  flux")

    anew = client.run(graph(recalibrate=True, steps=4))
    assert path.stat().st_mtime_ns != written and list(empty.iterdir()) == [path] and peek(path).about.steps == 4
    assert anew.outputs[key("DuCaSVDCalibrator")]["text"][0].startswith("calibrated")

    both = client.run(graph(what="ICC", icc_method="svd", cache={"mode": "icc", "speedup": 1.2}))
    assert set(peek(path).tensors) == {"forecast", "icc"} and list(empty.iterdir()) == [path]
    assert "ICC svd rank 8" in setting_of(both.outputs)
    assert "Traceback" not in server.log_tail(10**6)[started:]


def without_calibrator(**cache) -> dict:
    """The part of the shipped graph that draws, with DuCa Cache on its own."""
    prompt = graph(cache=cache)
    prompt[key("DuCaCache")]["inputs"].pop("calibration")
    wanted = [key("DuCaCacheReport"), key("PreviewImage")]
    for node in wanted:  # which grows
        wanted += [link[0] for link in prompt[node]["inputs"].values() if isinstance(link, list)]
    return {node: prompt[node] for node in wanted}


def test_an_interrupt_on_the_server(served, empty):
    client = served[0]

    def picture(tail: int) -> bytes:
        outputs = client.run(without_calibrator(mode="off", tail=tail)).outputs  # tail: of no use here, but the node runs again
        with Image.open(BytesIO(client.image(outputs[key("PreviewImage")]["images"][0]))) as image:
            return image.tobytes()

    before = picture(0)
    prompt = graph(recalibrate=True)
    prompt[key("DuCaSVDCalibrator")]["inputs"]["model"] = prompt[key("DuCaCache")]["inputs"]["model"]  # the one that draws
    for stage in ("recording", "measuring", "trying plans 3"):
        _, messages, seconds = watched(client, prompt, stage)
        assert messages[-1]["type"] == "execution_interrupted" and seconds < 5
        assert not list(empty.glob("*")) and not list(empty.glob(".*"))
    assert picture(1) == before


def test_duca_cache_finds_it_on_the_server(served, empty, made):
    client = served[0]
    assert setting_of(client.run(without_calibrator()).outputs) == "auto 2x"
    empty.mkdir(exist_ok=True)
    (empty / "made.safetensors").write_bytes(made)
    other = without_calibrator()
    other[key("KSampler")]["inputs"]["seed"] += 1  # so that it samples again
    assert setting_of(client.run(other).outputs) == "auto 2x, calibrated"


def test_errors_on_the_server_name_the_node_and_the_remedy(served, empty):
    client = served[0]
    prompt = graph()
    prompt[key("DuCaPromptList")]["inputs"]["prompts"] = " \n"
    for wrong, words in (
        (prompt, "write at least one prompt"),
        (graph(steps=2), "smaller than min"),
        (graph(what="all", recalibrate=True), "all"),
        (graph(icc_method="pca", recalibrate=True), "pca"),
        (graph(cache={"mode": "icc"}), "needs low-rank factors of this model: run SVD Calibrator"),
    ):
        with pytest.raises(PromptError) as refused:
            client.run(wrong)
        assert words in str(refused.value)
    for path in empty.glob("*"):
        path.unlink()
    empty.rmdir()
    empty.write_text("a file where the folder should be")
    try:
        with pytest.raises(PromptError, match=r"DuCaSVDCalibrator.*not written.*check that its folder"):
            client.run(graph(recalibrate=True, steps=4))
    finally:
        empty.unlink()

"""Cache Sweep samples every setting as the host would, and says what it does."""

from __future__ import annotations

import asyncio
import copy
from collections.abc import Iterator
from types import SimpleNamespace

import comfy.model_management
import comfy.sd
import folder_paths
import pytest
import torch
from comfy.nested_tensor import NestedTensor
from comfy_api.latest import io
from comfyui_duca.nodes import DucaExtension, sidecars
from comfyui_duca.nodes.cache_sweep import CacheSweep
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.host import cached_model
from comfyui_duca.nodes.inputs.speedups import parse_speedups
from comfyui_duca.nodes.page import notices
from comfyui_duca.nodes.pictures import sweep as sweeping
from helpers.other_networks import unet
from helpers.pictures import cells, distance, enlarged, found, noise
from helpers.sampling import as_called, cached, last_report, sample

SMALL = {"steps": 6, "size": (16, 16)}


@pytest.fixture(autouse=True)
def as_the_host_works(tmp_path, monkeypatch) -> Iterator[None]:
    monkeypatch.setattr(folder_paths, "temp_directory", str(tmp_path / "temp"))
    monkeypatch.setitem(folder_paths.folder_names_and_paths, sidecars.FOLDER, ([str(tmp_path)], {".safetensors"}))
    with torch.inference_mode():
        yield
    comfy.model_management.interrupt_current_processing(False)


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


def sweep(model, **given) -> io.NodeOutput:
    """Runs the node as the host calls it."""
    values = {
        "positive": encode_prompt("red apple"), "negative": encode_prompt(""), "latent_image": {"samples": torch.zeros(1, 3, 16, 16)},
        "vae": comfy.sd.VAE(sd={"pixel_space_vae": torch.tensor(1.0)}), "noise_seed": 3, "steps": 6, "cfg": 2.5, "sampler_name": "euler",
        "scheduler": "simple", "denoise": 1.0, "mode": "auto", "speedups": "2", "fewer_steps": True, **given,
    }  # fmt: skip
    return as_called(CacheSweep, "5").execute(model=model, **values)


def drawn(model, **given) -> torch.Tensor:
    """Returns the picture of a sampling outside the node."""
    latent = sample(model, **{**SMALL, "seed": 3, **given})
    return (latent.movedim(1, -1) / 2 + 0.5).clamp(0, 1)


@pytest.fixture
def shown(monkeypatch) -> list[str]:
    """Returns a list that collects the texts under the node while it works."""
    texts: list[str] = []
    monkeypatch.setattr(notices, "show", lambda text, node_id: node_id == "5" and texts.append(text))
    return texts


def test_every_picture_is_what_the_host_samples(model):
    grid, _, table, images = sweep(model, speedups="2, 3").result
    settings = [cached(model, speedup=speed) for speed in (2.0, 3.0)]
    pictures = [drawn(model), drawn(settings[0]), drawn(model, steps=3), drawn(settings[1]), drawn(model, steps=2)]
    assert torch.allclose(images, torch.cat(pictures), atol=1e-6)
    rows = cells(table)
    assert [row[0] for row in rows] == ["no cache, 6 steps", "auto 2x", "no cache, 3 steps", "auto 3x", "no cache, 2 steps"]
    assert [row[1:3] for row in rows[1:]] == [distance(images[0], image) for image in images[1:]]
    compute = [last_report(one).compute_speedup for one in settings]
    assert [row[4] for row in rows] == ["1.00x", f"{compute[0]:.2f}x", "2.00x", f"{compute[1]:.2f}x", "3.00x"]
    assert all(found(grid, enlarged(image, 15)) for image in images)


@pytest.mark.parametrize("mode", ["paper", "forecast"])
def test_other_modes(model, mode):
    _, _, table, images = sweep(model, mode=mode, speedups="3", fewer_steps=False).result
    patched = cached(model, mode=mode, speedup=3.0)
    assert torch.allclose(images[1:], drawn(patched), atol=1e-6) and not torch.equal(images[0], images[1])
    assert cells(table)[1][0] == f"{mode} 3x" and cells(table)[1][4] == f"{last_report(patched).compute_speedup:.2f}x"


def test_only_the_speed_ups_are_sampled_where_fewer_steps_are_not_wanted(model, shown):
    _, _, table, images = sweep(model, speedups="1, 3.0, 1.5, 3", fewer_steps=False).result
    assert [row[0] for row in cells(table)] == ["no cache, 6 steps", "auto 3x", "auto 1.5x"] and len(images) == 3
    assert sum("step 6 of 6" in text for text in shown) == 3


def test_a_cache_on_the_model_is_replaced(model):
    with_cache = cached(model, mode="paper", cycle_length=3)
    sample(with_cache, steps=2, size=(16, 16))
    before, wrappers = last_report(with_cache), copy.copy(with_cache.wrappers)
    given = {"steps": 4, "fewer_steps": False}
    assert torch.equal(sweep(with_cache, **given).result[3], sweep(model, **given).result[3])
    assert last_report(with_cache) is before and with_cache.wrappers == wrappers, "and stays on the one that came in"


def test_the_same_fewer_steps_are_sampled_once(model, shown):
    """6 / 3.5 and 6 / 3 are both two steps."""
    _, _, table, images = sweep(model, speedups="3, 3.5").result
    assert [row[0] for row in cells(table)][2::2] == ["no cache, 2 steps"] * 2
    assert torch.equal(images[2], images[4]) and sum(text.endswith("step 2 of 2") for text in shown) == 2, "and the warm-up"


def test_a_batch_with_a_mask_is_sampled_as_by_ksampler(model):
    from nodes import common_ksampler  # the host's

    mask = torch.zeros(1, 1, 16, 16)
    mask[..., 8:] = 1
    latent = {"samples": noise(2).movedim(-1, 1) * 2 - 1, "noise_mask": mask, "batch_index": [4, 7]}
    conds = encode_prompt("red apple"), encode_prompt("")
    (expected,) = common_ksampler(model, 3, 6, 2.5, "dpmpp_2m", "beta", *conds, latent, denoise=0.6)
    _, _, table, images = sweep(model, latent_image=latent, sampler_name="dpmpp_2m", scheduler="beta", denoise=0.6).result
    assert images.shape == (6, 16, 16, 3) and len(cells(table)) == 3
    assert torch.allclose(images[:2], (expected["samples"].movedim(1, -1) / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_an_empty_latent_of_another_kind_is_fitted_as_by_ksampler(model):
    """The latent has four channels where the model has three, and two pixels per element (which some hosts heed) where it has one."""
    from nodes import common_ksampler  # the host's

    latent = {"samples": torch.zeros(1, 4, 8, 8), "downscale_ratio_spacial": 2}
    (expected,) = common_ksampler(model, 3, 4, 2.5, "euler", "simple", encode_prompt("red apple"), encode_prompt(""), latent)
    images = sweep(model, latent_image=latent, steps=4, fewer_steps=False).result[3]
    assert torch.allclose(images[:1], (expected["samples"].movedim(1, -1) / 2 + 0.5).clamp(0, 1), atol=1e-6)


def test_of_pictures_with_sound_the_pictures_are_shown(model, monkeypatch):
    """VAE Decode does the same with a latent of both."""
    latent, sound = noise(1).movedim(-1, 1) * 2 - 1, torch.zeros(1, 8, 5)
    monkeypatch.setattr(comfy.sample, "sample", lambda *a, **k: NestedTensor([latent, sound]))
    images = sweep(model, fewer_steps=False).result[3]
    assert torch.allclose(images, noise(1).expand(2, -1, -1, -1), atol=1e-6)


def test_time_is_that_of_the_sampling_alone(model, shown, monkeypatch):
    """The clock ticks at each step, so neither warm-up nor decoding counts."""
    ticks = SimpleNamespace(perf_counter=lambda: sum("step 0 " not in text for text in shown))
    monkeypatch.setattr(sweeping, "time", ticks)
    rows = cells(sweep(model, speedups="2, 3").result[2])
    assert [row[3] for row in rows] == ["1.00x", "1.00x", "2.00x", "1.00x", "3.00x"]


def test_progress_never_goes_back_and_names_its_stages(model, shown, monkeypatch):
    bar: list[float] = []
    monkeypatch.setattr(comfy.utils.ProgressBar, "update_absolute", lambda self, value, *a: bar.append(value / self.total))
    sweep(model)
    assert list(dict.fromkeys(text.split(":")[0] for text in shown if "decoding" not in text)) == [
        "warming up", "no cache, 6 steps (1 of 3)", "auto 2x (2 of 3)", "no cache, 3 steps (3 of 3)",
    ]  # fmt: skip
    assert shown[-1] == "decoding 3 of 3"
    assert bar == sorted(bar) and bar[0] == 0 and bar[-1] == 1 and len(set(bar)) > 15


@pytest.mark.parametrize("stage", ["warming up: step 1", "no cache, 6 steps (1 of 3): step 3", "auto 2x (2 of 3): step 0", "decoding 1"])
def test_a_cancel_ends_it_at_once_and_leaves_the_model_as_it_was(model, monkeypatch, stage):
    before, wrappers, texts = sample(model, **SMALL), copy.deepcopy(model.wrappers), []

    def show(text: str, node_id: str | None) -> None:
        if node_id == "5":
            texts.append(text)
            if text.startswith(stage):
                comfy.model_management.interrupt_current_processing()

    monkeypatch.setattr(notices, "show", show)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sweep(model)
    assert texts[-1].startswith(stage), "nothing went on after it"
    assert model.wrappers == wrappers and torch.equal(before, sample(model, **SMALL))


def test_a_run_whose_cache_stood_aside_says_so(model, monkeypatch):
    def refuse(*_args, **_kwargs):
        raise ValueError("for a reason")

    monkeypatch.setattr(cached_model, "run_start", refuse)
    _, _, table, images = sweep(model, fewer_steps=False).result
    assert cells(table)[1][:3] == ["auto 2x (cache not used)", "identical", "1.000"] and cells(table)[1][4] == "-"
    assert torch.equal(images[0], images[1])


def test_a_model_that_has_no_cache(shown):
    with pytest.raises(ValueError, match="UNetModel is a UNet"):
        sweep(unet())
    assert not shown


def test_speedups_are_read_as_written():
    assert parse_speedups("1.5, 2,2.8 ,\n 6, 1,") == [1.5, 2, 2.8, 6]
    assert parse_speedups(",".join(f"{1 + k / 4:g}" for k in range(1, 13))) == [1 + k / 4 for k in range(1, 13)]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("2, fast, 3", "'fast' is not a number"),
        ("2x", "'2x' is not a number"),
        ("2; 3", "'2; 3' is not a number"),
        ("2, 6.5", "'6.5' is not between 1 and 6"),
        ("0.5, 2", "'0.5' is not between 1 and 6"),
        ("-2", "'-2' is not between"),
        ("2, nan", "'nan' is not between"),
        ("", "at least one number above 1"),
        ("1", "at least one number above 1"),
        (", ".join(["2"] * 13), "has 13 numbers; at most 12"),
    ],
)
def test_wrong_speedups_are_refused_before_sampling(model, shown, text, words):
    assert words in CacheSweep.validate_inputs(speedups=text)
    with pytest.raises(ValueError, match=words):  # values that come by a link are not validated
        sweep(model, speedups=text)
    assert not shown


def test_modes_that_cannot_be_swept(model, shown):
    for mode in ("off", "icc", "turbo"):
        with pytest.raises(ValueError, match=f"unknown mode '{mode}': use one of auto, paper, forecast"):
            sweep(model, mode=mode)
    assert not shown


# -- as the page sees it -------------------------------------------------------------------------------


def test_saved_workflows_depend_on_this_order():
    assert CacheSweep in asyncio.run(DucaExtension().get_node_list())
    info = CacheSweep.GET_NODE_INFO_V1()
    assert list(info["input"]["required"]) == [
        "model", "positive", "negative", "latent_image", "vae", "noise_seed", "steps", "cfg", "sampler_name", "scheduler", "denoise",
        "mode", "speedups", "fewer_steps",
    ]  # fmt: skip
    assert "optional" not in info["input"] and info["output_name"] == ["grid", "difference", "table", "images"] and info["output_node"]
    assert info["description"] and all(info["output_tooltips"])
    assert all(spec[1].get("tooltip") for spec in info["input"]["required"].values())


def test_a_sweep_is_not_run_again_by_itself(tmp_path):
    """The page randomises an input called `noise_seed` unless it is set not to. A new calibration is a reason to run again."""
    assert CacheSweep.GET_NODE_INFO_V1()["input"]["required"]["noise_seed"][1]["control_after_generate"] is False
    assert CacheSweep.validate_inputs(speedups="1, 2") is True and CacheSweep.validate_inputs() is True
    before = [CacheSweep.fingerprint_inputs(mode=mode, steps=8) for mode in ("auto", "paper", None)]
    (tmp_path / "new.duca.safetensors").write_bytes(b"")
    after = [CacheSweep.fingerprint_inputs(mode=mode, steps=8) for mode in ("auto", "paper", None)]
    assert [a == b for a, b in zip(before, after)] == [False, True, False]

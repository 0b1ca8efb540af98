"""Which sidecar belongs to a model: its checkpoint is known again whatever is on it, and no file breaks the search."""

from __future__ import annotations

import gc
import os
import sys
import weakref
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import comfy.hooks
import comfy.model_management
import comfy.ops
import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection
from comfyui_duca.cache_core.calibration.fingerprint import Fingerprint
from comfyui_duca.cache_core.calibration.sidecar import SidecarError, read, write
from comfyui_duca.nodes import sidecars
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.sidecars import fingerprint_of
from host import sample
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_sidecar import ABOUT, sidecar
from torch import Tensor, nn

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def of_demo() -> Fingerprint:
    return fingerprint_of(load_demo_model())


@pytest.fixture
def model():
    """One for each test, as what is loaded stays loaded."""
    yield load_demo_model()
    comfy.model_management.unload_all_models()


def change_for_all(model: ModelPatcher) -> dict:
    """A LoRA's patches, which move every weight by several percent."""
    g = torch.Generator().manual_seed(3)
    named = model.model.diffusion_model.named_parameters()
    return {f"diffusion_model.{name}": ("diff", (0.05 * torch.randn(w.shape, generator=g),)) for name, w in named}


def with_lora(model: ModelPatcher) -> ModelPatcher:
    clone = model.clone()
    assert clone.add_patches(change_for_all(model))
    return clone


@torch.no_grad()
def load(model: ModelPatcher) -> None:
    """As the host does before it samples."""
    comfy.model_management.load_models_gpu([model])


def as_they_lie(model: ModelPatcher) -> Fingerprint:
    """Of whatever the network's weights are at the moment."""
    return Fingerprint.of(model.model.diffusion_model.named_parameters())


def perturbed(model: ModelPatcher) -> ModelPatcher:
    """Every weight moved by 1 %, in place, as another checkpoint in the same network."""
    g = torch.Generator().manual_seed(4)
    for w in model.model.diffusion_model.parameters():
        w.data.mul_(1 + 0.01 * torch.randn(w.shape, generator=g))
    return model


def patcher_of(network: nn.Module) -> ModelPatcher:
    model = nn.Module()
    model.diffusion_model = network
    return ModelPatcher(model, CPU, CPU)


def same(a: Fingerprint, b: Fingerprint) -> bool:
    """Of the very same numbers: a LoRA that was taken off leaves no rounding."""
    return (a.structure, a.dtype) == (b.structure, b.dtype) and torch.equal(a.values, b.values)


def test_it_is_that_of_the_weights(model, of_demo):
    assert same(as_they_lie(model), of_demo)
    assert of_demo.values.shape == (64, 64) and of_demo.dtype == "float32"


def test_a_lora_that_is_not_loaded(model, of_demo):
    assert same(fingerprint_of(with_lora(model)), of_demo)


def test_a_lora_applied_by_sampling(of_demo):
    with torch.inference_mode():  # as the host does all its work
        model = load_demo_model()
        clone = with_lora(model)
        sample(clone, steps=1, size=(16, 16))
        assert not as_they_lie(model).matches(of_demo), "the LoRA should be in the weights"
        assert same(fingerprint_of(clone), of_demo)
    assert fingerprint_of(model).matches(of_demo)
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("asked", ["first", "another", "of the loaded"])
def test_a_lora_on_another_clone(model, of_demo, asked):
    loaded, other = with_lora(model), model.clone()
    load(loaded)
    assert not as_they_lie(model).matches(of_demo)
    assert same(fingerprint_of({"first": model, "another": other, "of the loaded": loaded.clone()}[asked]), of_demo)


def test_one_lora_after_another(model, of_demo):
    for clone in (with_lora(model), with_lora(with_lora(model)), model.clone()):
        load(clone)
        assert same(fingerprint_of(model), of_demo) and same(fingerprint_of(clone), of_demo)
    assert same(as_they_lie(model), of_demo)


def test_a_lora_whose_clone_is_gone(model, of_demo):
    clone = with_lora(model)
    load(clone)
    del clone
    gc.collect()
    assert not as_they_lie(model).matches(of_demo) and same(fingerprint_of(model), of_demo)


def test_a_lora_on_a_patcher_that_is_no_clone(model, of_demo):
    other = ModelPatcher(model.model, CPU, CPU)
    other.add_patches(change_for_all(model))
    load(other)
    assert not as_they_lie(model).matches(of_demo) and same(fingerprint_of(model), of_demo)


def test_a_lora_applied_on_the_fly(model, of_demo):
    """What does not fit is left unpatched, with a function on the layer; a part that fits is patched."""
    clone = with_lora(model)
    clone.patch_model(CPU, lowvram_model_memory=clone.model_size() // 2)
    modules = list(model.model.diffusion_model.modules())
    assert any(getattr(m, "weight_function", None) for m in modules) and any(getattr(m, "comfy_patched_weights", False) for m in modules)
    assert same(fingerprint_of(model), of_demo)
    clone.partially_unload(CPU, clone.model_size() // 4)
    assert same(fingerprint_of(model), of_demo)
    clone.unpatch_model(CPU)
    assert same(as_they_lie(model), of_demo)


@pytest.mark.parametrize("beneath", [False, True])
def test_a_lora_by_hook(model, of_demo, beneath):
    """Scheduled LoRAs are put on during a sampling, on top of those that were loaded."""
    clone = with_lora(model) if beneath else model.clone()
    load(clone)
    group, hook = comfy.hooks.HookGroup(), comfy.hooks.WeightHook()
    group.add(hook)
    clone.add_hook_patches(hook, change_for_all(model))
    before = as_they_lie(model)
    clone.patch_hooks(group)
    assert not as_they_lie(model).matches(before) and clone.hook_backup
    assert same(fingerprint_of(clone), of_demo) and same(fingerprint_of(model), of_demo)
    clone.clean_hooks()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_every_dtype_is_one_checkpoint(of_demo, dtype):
    other = load_demo_model(weight_dtype=dtype)
    taken = fingerprint_of(other)
    assert taken.matches(of_demo) and taken.short == of_demo.short and taken.dtype == str(dtype).removeprefix("torch.")
    clone = with_lora(other)
    load(clone)
    assert same(fingerprint_of(other), taken) and not as_they_lie(other).matches(of_demo)
    comfy.model_management.unload_all_models()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_another_checkpoint_is_not(of_demo, dtype):
    other = fingerprint_of(perturbed(load_demo_model(weight_dtype=dtype)))
    assert not other.matches(of_demo) and not of_demo.matches(other)


def test_torch_compile_changes_no_name(model, of_demo):
    network = model.model.diffusion_model
    network.double_blocks[0] = torch.compile(network.double_blocks[0])
    assert same(fingerprint_of(model), of_demo)
    load(with_lora(model))
    assert same(fingerprint_of(model), of_demo)
    model.model.diffusion_model = torch.compile(network)
    assert same(fingerprint_of(model), of_demo)
    model.model.diffusion_model = network


def test_an_injection_is_taken_off_meanwhile(model, of_demo):
    network = model.model.diffusion_model
    layer = network.img_in
    injection = PatcherInjection(
        lambda patcher: setattr(network, "img_in", nn.Sequential(layer)), lambda patcher: setattr(network, "img_in", layer)
    )
    clone = model.clone()
    clone.set_injections("test", [injection])
    clone.inject_model()
    assert same(fingerprint_of(clone), of_demo) and network.img_in is not layer
    clone.eject_model()


class Layers(nn.Module):
    def __init__(self, linear: type, count: int = 3, **more) -> None:
        super().__init__()
        self.layers = nn.ModuleList(linear(16, 24, **more) for _ in range(count))


def dense_layers() -> Layers:
    torch.manual_seed(0)
    return Layers(nn.Linear)


def test_scaled_fp8_is_taken_with_its_scale():
    dense = dense_layers()
    scaled = Layers(comfy.ops.scaled_fp8_ops(override_dtype=torch.float8_e4m3fn).Linear, dtype=torch.float32)
    for layer, original in zip(scaled.layers, dense.layers):
        scale = original.weight.abs().max().detach() / 448
        layer.scale_weight.data.copy_(scale)
        layer.weight.data.copy_((original.weight.detach() / scale).to(torch.float8_e4m3fn))
        layer.bias = nn.Parameter(original.bias.detach().clone())
    model, original = patcher_of(scaled), fingerprint_of(patcher_of(dense))
    taken = fingerprint_of(model)
    assert taken.dtype == "float8_e4m3fn" and taken.matches(original) and taken.short == original.short
    assert not taken.matches(fingerprint_of(patcher_of(Layers(nn.Linear))))
    load(with_lora(model))
    assert same(fingerprint_of(model), taken)
    comfy.model_management.unload_all_models()


def test_quantised_layers_of_the_host():
    dense = dense_layers()
    config = {f"layers.{i}": {"format": "float8_e4m3fn"} for i in range(2)}
    quantised = Layers(comfy.ops.mixed_precision_ops(config, torch.bfloat16).Linear)
    state = {name: w.detach().bfloat16() for name, w in dense.named_parameters()}
    for name in config:
        weight = dense.get_parameter(f"{name}.weight").detach()
        scale = weight.abs().max() / 448
        state |= {f"{name}.weight": (weight / scale).to(torch.float8_e4m3fn), f"{name}.weight_scale": scale}
    quantised.load_state_dict(state)
    model, original = patcher_of(quantised), fingerprint_of(patcher_of(dense))
    taken = fingerprint_of(model)
    assert taken.dtype == "float8_e4m3fn" and taken.matches(original) and original.matches(taken)
    load(with_lora(model))
    assert same(fingerprint_of(model), taken)
    comfy.model_management.unload_all_models()


class Packed(torch.Tensor):
    """As GGUF's: bytes that say they have the weight's shape, and LoRAs beside them. Here one byte is one value."""

    @staticmethod
    def of(weight: Tensor) -> Packed:
        packed = (weight.detach() * 64).round().clamp(-127, 127).to(torch.int8).view(torch.uint8).reshape(-1)
        packed = torch.cat((packed, packed.new_zeros(7))).as_subclass(Packed)  # no size tells the shape
        packed.tensor_shape, packed.patches = weight.shape, []
        return packed

    def detach(self) -> Packed:
        return self

    @property
    def shape(self) -> torch.Size:
        return getattr(self, "tensor_shape", None) or self.size()


class PackedLinear(nn.Linear):
    def get_weight(self, tensor: Packed, dtype: torch.dtype) -> Tensor:
        plain = tensor.as_subclass(Tensor)[:-7].view(torch.int8).to(dtype).reshape(tensor.tensor_shape) / 64
        return plain + sum(tensor.patches)


def packed(dense: Layers) -> ModelPatcher:
    layers = Layers(PackedLinear)
    for layer, original in zip(layers.layers, dense.layers):
        layer.weight, layer.bias = nn.Parameter(Packed.of(original.weight), requires_grad=False), None
    return patcher_of(layers)


def test_gguf_is_unpacked_without_its_loras():
    model, plain = packed(dense_layers()), Layers(nn.Linear)
    weights = [layer.weight for layer in model.model.diffusion_model.layers]
    for layer, weight in zip(plain.layers, weights):
        layer.weight, layer.bias = nn.Parameter(PackedLinear.get_weight(layer, weight, torch.float32)), None
    taken = fingerprint_of(model)
    assert taken.matches(fingerprint_of(patcher_of(plain)))
    assert not taken.matches(fingerprint_of(packed(Layers(nn.Linear))))
    for weight in weights:
        weight.patches = [torch.ones(24, 16)]
    other = patcher_of(model.model.diffusion_model)
    sidecars._known._fingerprints.clear()
    assert same(fingerprint_of(other), taken) and all(len(weight.patches) == 1 for weight in weights)


def test_packed_weights_of_unknown_make_do_not_count():
    layers = dense_layers()
    without = Fingerprint.of((name, w) for name, w in layers.named_parameters() if name != "layers.0.weight")
    layers.layers[0].weight = nn.Parameter(torch.zeros(200, dtype=torch.uint8), requires_grad=False)
    assert same(fingerprint_of(patcher_of(layers)), without)
    with pytest.raises(ValueError):
        fingerprint_of(patcher_of(nn.Linear(2, 2)))


@pytest.fixture
def computed(monkeypatch) -> list:
    """Grows with every fingerprint that is computed and not remembered."""
    compute, calls = sidecars._fingerprint, []
    monkeypatch.setattr(sidecars, "_fingerprint", lambda weights: calls.append(1) or compute(weights))
    return calls


def test_it_is_computed_once_for_all_clones(model, computed):
    first = fingerprint_of(model)
    load(with_lora(model))
    assert fingerprint_of(model) is first and fingerprint_of(with_lora(model)) is first and len(computed) == 1


def test_it_is_computed_anew_for_other_weights(model, computed):
    before = fingerprint_of(model)
    assert not fingerprint_of(perturbed(model)).matches(before) and len(computed) == 2
    model.model.diffusion_model.load_state_dict(load_demo_model().model.diffusion_model.state_dict())
    assert same(fingerprint_of(model), before) and len(computed) == 3
    model.model.diffusion_model = perturbed(load_demo_model()).model.diffusion_model
    assert not fingerprint_of(model).matches(before)


def test_nothing_is_kept_alive(model):
    other = load_demo_model()
    fingerprint_of(other)
    network, known = weakref.ref(other.model.diffusion_model), len(sidecars._known._fingerprints)
    del other
    gc.collect()
    assert network() is None and len(sidecars._known._fingerprints) < known


@pytest.fixture
def folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """The host's table with empty folders, none of which exists."""
    paths = {name: tmp_path / name for name in (sidecars.FOLDER, "diffusion_models", "checkpoints")}
    for name, path in paths.items():
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    return paths


@pytest.fixture
def put(folders, of_demo):
    """Writes a sidecar, the demo model's unless told, and gives its path."""

    def put(name: str, fingerprint: Fingerprint = of_demo, folder: str = sidecars.FOLDER, **about) -> Path:
        path = folders[folder] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, replace(sidecar(), fingerprint=fingerprint, about=replace(ABOUT, **about)))
        return path

    return put


def search(model: ModelPatcher) -> tuple[Path | None, dict[str, str]]:
    """What was found, and the names of what was refused with the reasons."""
    refused: dict[Path, str] = {}
    found = sidecars.find(model, refused.__setitem__)
    return found and found.path, {path.name: reason for path, reason in refused.items()}


@pytest.fixture(scope="module")
def demo() -> ModelPatcher:
    """For tests that leave it as it is."""
    return load_demo_model()


def test_the_one_of_the_checkpoint_is_found(put, of_demo, demo):
    put("fine_tune.safetensors", fingerprint_of(perturbed(load_demo_model())), created="2027-01-01")
    put("smaller.safetensors", sidecar().fingerprint, created="2027-01-01")
    put("other_family.safetensors", family="sd3", created="2027-01-01")
    mine = put("mine.safetensors", fingerprint_of(load_demo_model(torch.bfloat16)), model_name="mine")
    found = sidecars.find(demo)
    assert found is not None and found.path == mine and found.about == replace(ABOUT, model_name="mine")
    assert search(demo) == (mine, {})
    mine.unlink()
    assert search(demo) == (None, {})


def test_nothing_anywhere(folders, demo, computed):
    assert search(demo) == (None, {}) and sidecars.names() == [] and not computed
    assert not any(path.exists() for path in folders.values())


def test_a_model_of_no_family(put):
    put("a.safetensors")
    assert sidecars.find(patcher_of(nn.Linear(20, 20))) is None


def test_files_that_cannot_be_used_are_told_and_end_nothing(put, folders, demo):
    mine, folder = put("m.safetensors", created="2026-01-01"), folders[sidecars.FOLDER]
    cut, newer, edited, damaged = (put(f"{name}.safetensors", created="2027-01-01") for name in ("cut", "newer", "edited", "damaged"))
    cut.write_bytes(cut.read_bytes()[:-9])
    for path, change in ((newer, {"duca_format": "2"}), (edited, {"about": "{}"})):
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
        save_file(load_file(path), path, metadata | change)
    with safe_open(damaged, "pt") as file:
        metadata = file.metadata()
    save_file(load_file(damaged) | {"fingerprint.values": torch.ones(64, 64)}, damaged, metadata)
    save_file({"w": torch.ones(3)}, folder / "foreign.safetensors")
    (folder / "empty.safetensors").touch()
    (folder / "folder.safetensors").mkdir()
    with suppress(OSError):  # not every system allows it
        (folder / "link.safetensors").symlink_to(folder / "nowhere")
    (folder / "notes.txt").write_text("no sidecar, and not meant to be")
    for _ in range(2):  # what is remembered of a file changes nothing
        found, refused = search(demo)
        assert found == mine
        assert set(refused) == {f"{name}.safetensors" for name in ("cut", "newer", "edited", "damaged", "foreign", "empty")}
        assert "format 2" in refused["newer.safetensors"] and refused["newer.safetensors"].endswith("update the pack")
        assert "no calibration sidecar" in refused["foreign.safetensors"] and "damaged" in refused["damaged.safetensors"]
    assert sidecars.find(demo) is not None, "who does not want to know need not say so"
    mine.unlink()
    assert search(demo)[0] is None


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="everything is allowed to this user")
def test_a_file_that_may_not_be_read_until_it_may(put, demo):
    path = put("mine.safetensors")
    path.chmod(0)
    assert "cannot be read" in search(demo)[1]["mine.safetensors"]
    path.chmod(0o600)
    assert search(demo) == (path, {})


@pytest.mark.parametrize("folder", ["diffusion_models", "checkpoints"])
def test_beside_a_checkpoint(put, folders, demo, folder):
    put("weights.safetensors", folder=folder)  # whatever it is, only the ending makes it one of ours
    save_file({"w": torch.ones(3)}, folders[folder] / "checkpoint.safetensors")
    assert search(demo) == (None, {})
    mine = put("flux/mine.Duca.SafeTensors", folder=folder)
    (folders[folder] / "bad.duca.safetensors").touch()
    found, refused = search(demo)
    assert found == mine and set(refused) == {"bad.duca.safetensors"}
    newer = put("mine.safetensors", created="2027-01-01")
    assert search(demo)[0] == newer, "no folder comes before another"


def test_the_newest_wins_and_ties_are_settled(put, demo):
    old, new = put("b.safetensors", created="2026-01-01"), put("a.safetensors", created="2026-03-01")
    assert search(demo)[0] == new
    put("a.safetensors", created="2026-01-01")
    for late, early in ((old, new), (new, old)):
        os.utime(early, (1e9, 1e9))
        os.utime(late, (2e9, 2e9))
        assert search(demo)[0] == late
    os.utime(old, (2e9, 2e9))
    assert {search(demo)[0] for _ in range(3)} == {old}, "the later name"


def test_a_file_is_opened_again_only_when_it_changed(put, demo, monkeypatch):
    opened, look = [], sidecars.peek
    monkeypatch.setattr(sidecars, "peek", lambda path: opened.append(path.name) or look(path))
    a = put("a.safetensors")
    put("b.safetensors", sidecar().fingerprint)
    search(demo)
    search(demo)
    assert sorted(opened) == ["a.safetensors", "b.safetensors"]
    put("a.safetensors", created="2027-05-05")
    os.utime(a, (3e9, 3e9))
    found = sidecars.find(demo)
    assert found is not None and found.about.created == "2027-05-05" and opened[2:] == ["a.safetensors"]


def test_one_folder_within_another_gives_a_file_once(put, folders, demo, monkeypatch):
    within = str(folders["diffusion_models"] / "calibrations")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, sidecars.FOLDER, ([within], {".safetensors"}))
    put("calibrations/bad.duca.safetensors", folder="diffusion_models").write_bytes(b"")
    told = []
    sidecars.find(demo, lambda path, reason: told.append(path))
    assert len(told) == 1


def test_a_folder_that_disappears(put, demo):
    mine = put("mine.safetensors")
    beside = put("flux/other.duca.safetensors", folder="checkpoints", created="2027-01-01")
    assert search(demo)[0] == beside
    beside.unlink()
    beside.parent.rmdir()
    assert search(demo) == (mine, {})
    mine.unlink()
    mine.parent.rmdir()
    assert search(demo) == (None, {}) and sidecars.names() == []


def test_a_folder_that_cannot_be_listed(folders, demo, monkeypatch):
    def fails(*args, **more):
        raise OSError("the network drive is gone")

    folders["checkpoints"].mkdir()
    monkeypatch.setattr(folder_paths, "recursive_search", fails)
    assert sidecars.names() == [] and search(demo) == (None, {})


NAMES = ["plain", "with space", "日本語 ☺", 'quote\'s "double"', "a;b&c|d$e", "dots...", "-dash", "percent%20", "x" * 200, "sub/deep/one"]


@pytest.mark.skipif(sys.platform == "win32", reason="not all of these can be there")
def test_names_with_odd_characters(put, demo):
    paths = {f"{name}.safetensors": put(f"{name}.safetensors") for name in NAMES}
    assert set(sidecars.names()) == set(paths) and sidecars.names() == sorted(paths)
    for name, path in paths.items():
        assert sidecars.path_of(name) == path and read(path, ()).about == ABOUT
    for path in paths.values():
        os.utime(path, (1e9, 1e9))
    for path in paths.values():
        os.utime(path, (4e9, 4e9))
        assert search(demo) == (path, {})
        os.utime(path, (1e9, 1e9))


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere every name is Unicode")
def test_a_name_that_is_no_unicode(put, demo):
    """safetensors opens no such file."""
    mine, odd = put("mine.safetensors"), put(os.fsdecode(b"latin \xe9.safetensors"), created="2027-01-01")
    found, refused = search(demo)
    assert found == mine and set(refused) == {odd.name} and odd.name in sidecars.names()


@pytest.mark.parametrize("name", ["gone.safetensors", "../outside.safetensors", "", "nul\0.safetensors"])
def test_a_name_that_is_not_there(put, folders, name):
    put("mine.safetensors")
    write(folders[sidecars.FOLDER].parent / "outside.safetensors", sidecar())
    with pytest.raises(FileNotFoundError):
        sidecars.path_of(name)
    with pytest.raises(FileNotFoundError):
        sidecars.path_of(str(folders[sidecars.FOLDER].parent / "outside.safetensors"))


@pytest.mark.parametrize(
    "name, safe",
    {
        "flux1-dev": "flux1-dev",
        "FLUX/flux1-dev.fp8.safetensors": "flux1-dev_fp8",
        "FLUX\\flux1-dev-Q4_0.gguf": "flux1-dev-Q4_0",
        "../../etc/passwd": "passwd",
        "..": "model",
        "": "model",
        "C:\\con": "con",
        "nul.x": "nul_x",
        ".hidden": "hidden",
        'a<b>c:d"e|f?g*h\n\0': "a_b_c_d_e_f_g_h",
        "日本語 ☺.safetensors": "日本語",
        "lone \udce9": "lone",
        "x" * 500: "x" * 120,
        "語" * 500: "語" * 40,
    }.items(),
    ids=lambda item: ascii(item)[:30],
)
def test_the_default_path(folders, of_demo, name, safe):
    path = sidecars.default_path(name, of_demo)
    assert path == folders[sidecars.FOLDER] / f"{safe}-{of_demo.short}.duca.safetensors"
    assert sidecars.save(replace(sidecar(), fingerprint=of_demo, about=replace(ABOUT, model_name="x" + safe))).parent == path.parent
    write(path, sidecar())
    assert path.name in sidecars.names()


def test_saved_it_is_found(folders, of_demo, demo):
    assert not folders[sidecars.FOLDER].exists()
    path = sidecars.save(replace(sidecar(), fingerprint=of_demo))
    assert search(demo) == (path, {}) and sidecars.names() == [path.name] and sidecars.path_of(path.name) == path
    assert sidecars.save(replace(sidecar(), fingerprint=of_demo)) == path


def test_a_folder_that_cannot_be_made_or_written_to(folders, of_demo):
    folders[sidecars.FOLDER].write_text("a file where the folder should be")
    with pytest.raises(SidecarError) as caught:
        sidecars.save(replace(sidecar(), fingerprint=of_demo))
    assert caught.value.remedy and sidecars.names() == []
    assert caught.value.path == str(folders[sidecars.FOLDER]) and "the folder cannot be made" in caught.value.reason
    if hasattr(os, "geteuid") and os.geteuid():
        folders[sidecars.FOLDER].unlink()
        folders[sidecars.FOLDER].mkdir(mode=0o500)
        with pytest.raises(SidecarError):
            sidecars.save(replace(sidecar(), fingerprint=of_demo))


def test_the_folder_is_registered_and_not_made(monkeypatch, tmp_path):
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    for _ in range(2):
        sidecars.register()
        assert folder_paths.folder_names_and_paths == {sidecars.FOLDER: ([str(tmp_path / sidecars.FOLDER)], {".safetensors"})}
    assert not list(tmp_path.iterdir())


def test_what_the_user_configured_comes_first(monkeypatch, tmp_path, of_demo):
    """extra_model_paths.yaml is read before nodes are loaded, and leaves no extensions."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {sidecars.FOLDER: (["/mine", "/ours"], set())})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    sidecars.register()
    roots, extensions = folder_paths.folder_names_and_paths[sidecars.FOLDER]
    assert roots == ["/mine", "/ours", str(tmp_path / sidecars.FOLDER)] and extensions == {".safetensors"}
    assert sidecars.default_path("a", of_demo).parent == Path("/mine")

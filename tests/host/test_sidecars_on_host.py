"""The sidecar of a model's checkpoint is found, no other one is taken for it, and no file breaks the search."""

from __future__ import annotations

import os
import sys
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_duca.cache_core.calibration.fingerprint import Fingerprint
from comfyui_duca.cache_core.calibration.sidecar import SidecarError, read, write
from comfyui_duca.nodes import sidecars
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.sidecars import fingerprint_of, lookup
from helpers.sampling import patcher_of, perturbed
from helpers.sidecars import ABOUT, sidecar
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

CPU = torch.device("cpu")


@pytest.fixture
def folders(tmp_path, monkeypatch) -> dict[str, Path]:
    """Returns the host's table of folders, none of which exists."""
    paths = {name: tmp_path / name for name in (sidecars.FOLDER, "diffusion_models", "checkpoints")}
    for name, path in paths.items():
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(path)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    return paths


@pytest.fixture
def put(folders, of_demo):
    """Returns a function that writes a sidecar, by default for the demo model, and returns its path."""

    def put(name: str, fingerprint: Fingerprint = of_demo, folder: str = sidecars.FOLDER, **about) -> Path:
        path = folders[folder] / name
        path.parent.mkdir(parents=True, exist_ok=True)
        write(path, replace(sidecar(), fingerprint=fingerprint, about=replace(ABOUT, **about)))
        return path

    return put


def search(model: ModelPatcher) -> tuple[Path | None, dict[str, str]]:
    """Returns the file that was found, and the reasons for refused ones by name."""
    refused: dict[Path, str] = {}
    found = sidecars.find(model, refused.__setitem__)
    return found and found.path, {path.name: reason for path, reason in refused.items()}


@pytest.fixture(scope="module")
def demo() -> ModelPatcher:
    """Returns the demo model, for tests that leave it unchanged."""
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
    held = load_file(damaged)
    save_file(held | {"fingerprint.values": torch.ones_like(held["fingerprint.values"])}, damaged, metadata)
    save_file({"w": torch.ones(3)}, folder / "foreign.safetensors")
    (folder / "empty.safetensors").touch()
    (folder / "folder.safetensors").mkdir()
    with suppress(OSError):  # some systems do not allow it
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
    put("weights.safetensors", folder=folder)  # only the ending makes a file one of ours
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
    opened, look = [], lookup.peek
    monkeypatch.setattr(lookup, "peek", lambda path: opened.append(path.name) or look(path))
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
    refused = []
    sidecars.find(demo, lambda path, reason: refused.append(path))
    assert len(refused) == 1


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
    """extra_model_paths.yaml is read before nodes are loaded, and sets no extensions."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {sidecars.FOLDER: (["/mine", "/ours"], set())})
    monkeypatch.setattr(folder_paths, "models_dir", str(tmp_path))
    sidecars.register()
    roots, extensions = folder_paths.folder_names_and_paths[sidecars.FOLDER]
    assert roots == ["/mine", "/ours", str(tmp_path / sidecars.FOLDER)] and extensions == {".safetensors"}
    assert sidecars.default_path("a", of_demo).parent == Path("/mine")

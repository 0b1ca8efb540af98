"""A sidecar outlives a host: it is found under the names that ComfyUI 0.3.75 and 0.33.0 give to one checkpoint's weights.

One host runs the test. A table, which follows both hosts' sources, gives its models the names of the other.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

import folder_paths
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.calibration.fingerprint import Fingerprint
from comfyui_duca.cache_core.calibration.sidecar import read, write
from comfyui_duca.nodes import sidecars
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.sidecars import calibrations
from helpers.sampling import perturbed
from helpers.sidecars import ABOUT, sidecar
from making import Case
from torch import Tensor, nn
from zoo import CASES
from zoo_flux_like import chroma_radiance

FROZEN = sorted((Path(__file__).resolve().parents[1] / "frozen").glob("*.duca.safetensors"))
# modules whose parameter is called `scale` on 0.3.75 and `weight` on 0.33.0
RENAMED = re.compile(
    r"(double_blocks\.\d+\.(img|txt)_attn\.norm|single_blocks\.\d+\.norm)\.(query|key)_norm"
    r"|distilled_guidance_layer\.norms\.\d+"
    r"|nerf_blocks\.\d+\.norm|nerf_final_layer(_conv)?\.norm"
)
UNUSED = "norm_final"  # of Lumina and Z-Image: only on 0.3.75, and used in no forward
NAMES_DIFFER = ("flux", "hunyuan_video", "chroma", "chroma_radiance", "flux2", "hunyuan3d", "lumina")
WIDE = next(case for case in CASES if case.name == "chroma_radiance")._replace(
    make=lambda: chroma_radiance(hidden_dim=64, nerf_hidden_size=64)  # all of its norms are then large enough to count
)
AFFECTED = [*(case for case in CASES if case.name in NAMES_DIFFER), WIDE]


def on_the_other_host(model: ModelPatcher) -> ModelPatcher:
    """Gives the weights of a model the other host's names, in place."""
    network, changed = model.model.diffusion_model, 0
    for place, module in network.named_modules():
        if RENAMED.fullmatch(place):
            old, new = ("scale", "weight") if "scale" in module._parameters else ("weight", "scale")
            module._parameters[new] = module._parameters.pop(old)
            changed += 1
    if hasattr(network, "cap_embedder"):  # Lumina
        changed += 1
        if hasattr(network, UNUSED):
            delattr(network, UNUSED)
        else:
            network.add_module(UNUSED, nn.LayerNorm(network.dim, bias=False))
    assert changed
    return model


def older_fingerprint(named: Iterable[tuple[str, Tensor]]) -> Fingerprint:
    """Returns the fingerprint of an older version of the pack: vectors count, under the host's names."""
    counted = sorted((name, w.detach()) for name, w in named if w.numel() >= 64)
    structure = hashlib.sha256(json.dumps([[name, list(w.shape)] for name, w in counted]).encode()).hexdigest()
    rows = min(64, len(counted))
    sampled = [counted[i * (len(counted) - 1) // (rows - 1)][1].flatten() for i in range(rows)]
    return Fingerprint(structure, "float32", torch.stack([w[[j * (len(w) - 1) // 63 for j in range(64)]] for w in sampled]))


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Returns the only folder in which the host looks for sidecars."""
    for name in (sidecars.FOLDER, "diffusion_models", "checkpoints"):
        monkeypatch.setitem(folder_paths.folder_names_and_paths, name, ([str(tmp_path / name)], {".safetensors"}))
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    (tmp_path / sidecars.FOLDER).mkdir()
    return tmp_path / sidecars.FOLDER


def is_found(path: Path, model: ModelPatcher) -> bool:
    """Returns whether the search finds it, and whether it is accepted when a user selects it."""
    found, refused = sidecars.find(model), []
    belongs = sidecars.belongs(read(path, ()).fingerprint, model)
    sidecars.find(model, lambda path, reason: refused.append(reason))
    assert belongs is (found is not None) and not refused
    return belongs


@pytest.mark.parametrize("case", AFFECTED, ids=[f"{case.name}-{i}" for i, case in enumerate(AFFECTED)])
def test_names_are_not_what_is_recognised(case: Case, folder):
    here, there = case.make(), on_the_other_host(case.make())
    names = [{name for name, _ in model.model.diffusion_model.named_parameters()} for model in (here, there)]
    assert names[0] != names[1]
    a, b = sidecars.fingerprint_of(here), sidecars.fingerprint_of(there)
    assert (a.structure, a.short) == (b.structure, b.short) and torch.equal(a.values, b.values)
    assert not a.matches(sidecars.fingerprint_of(perturbed(there))), "a fine-tune"


@pytest.mark.parametrize("made_there", [False, True], ids=["made here", "made on the other host"])
@pytest.mark.parametrize("case", AFFECTED, ids=[f"{case.name}-{i}" for i, case in enumerate(AFFECTED)])
def test_an_older_file_is_found_on_both(case: Case, folder, made_there):
    maker = on_the_other_host(case.make()) if made_there else case.make()
    network = maker.model.diffusion_model
    family = find_family(network)
    assert family is not None
    path = folder / "older.safetensors"
    write(path, replace(sidecar(), fingerprint=older_fingerprint(network.named_parameters()), about=replace(ABOUT, family=family.name)))
    assert is_found(path, case.make()) and is_found(path, on_the_other_host(case.make()))
    assert not is_found(path, perturbed(case.make())) and not is_found(path, perturbed(on_the_other_host(case.make())))


@pytest.mark.parametrize("path", FROZEN, ids=lambda path: path.name)
def test_files_that_were_made_on_either_host_are_found(folder, path):
    """The files are by the pack as it was before fingerprints left vectors out."""
    (folder / path.name).write_bytes(path.read_bytes())
    model = load_demo_model()
    calibrations.check(calibrations.load(path), model)
    assert is_found(folder / path.name, model) and not is_found(folder / path.name, perturbed(load_demo_model()))


def test_what_was_made_is_there():
    assert {read(path).about.versions["comfyui"] for path in FROZEN} == {"0.3.75", "0.33.0"}

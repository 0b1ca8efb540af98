"""Files of a DiT are recognised, and others are refused with a reason."""

from __future__ import annotations

import argparse
import pickle

import pytest
import safetensors.torch
import torch
from comfyui_duca.nodes.dit import model as dit_model
from comfyui_duca.nodes.dit.detect import name_of, shape_of
from comfyui_duca.nodes.dit.model import load_dit
from comfyui_duca.nodes.dit.network import DiT
from zoo_dit import EXTRA_MODELS, SHAPE, dit, network_of, saved, shapes_of, weights_of
from zoo_dit import DiT as PlainDiT

SIZES = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}  # of the paper: width, depth, heads


# --- files


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [2, 4, 8])
def test_published_sizes_are_recognised_by_their_shapes(size, patch):
    width, depth, heads = SIZES[size]
    expected = SHAPE._replace(
        width=width, depth=depth, heads=heads, mlp_width=4 * width, patch=patch, grid=32 // patch, classes=1000, waves=256
    )
    shapes = shapes_of(DiT(expected, device="meta").state_dict())
    assert shape_of(shapes) == expected and name_of(expected) == f"DiT-{size}/{patch}, 256x256, 1000 classes"
    if (size, patch) == ("XL", 2):
        assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 675_129_632  # the paper's 675 M
    assert shape_of({**shapes, "final_layer.linear.weight": (patch**2 * 4, width), "final_layer.linear.bias": (patch**2 * 4,)}) == (
        expected._replace(out_channels=4)
    )


def test_names_and_shapes_are_those_of_the_public_structure():
    assert shapes_of(PlainDiT().state_dict()) == shapes_of(network_of(dit()).state_dict())


LAYOUTS = {
    "plain": lambda w: w,
    "as the training script saves": lambda w: {
        "model": {name: torch.zeros_like(weight) for name, weight in w.items()}, "ema": w,
        "opt": {"state": {0: {"exp_avg": torch.zeros(2)}}, "param_groups": [{"lr": 1e-4}]}, "args": argparse.Namespace(model="DiT-XL/2"),
    },
    "only model": lambda w: {"model": w},
    "state_dict of wrapped modules": lambda w: {"state_dict": {f"module.{name}": weight for name, weight in w.items()}},
    "ComfyUI": lambda w: {f"model.diffusion_model.{name}": weight for name, weight in w.items()},
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_files_in_all_layouts_are_loaded(tmp_path, layout, suffix):
    content, weights = LAYOUTS[layout](weights_of()), weights_of()
    if suffix == ".safetensors":
        content = content if layout in ("plain", "ComfyUI") else {f"ema.{name}": weight for name, weight in weights.items()}
    loaded = network_of(load_dit(saved(tmp_path / f"a{suffix}", content)))
    # the rule gives a width of 64 one head of 64; the zoo's model has two heads
    assert loaded.shape == SHAPE._replace(heads=1)
    assert all(torch.equal(weight, weights[name]) for name, weight in loaded.state_dict().items())


def test_files_of_old_pytorch_are_loaded(tmp_path):
    torch.save(weights_of(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert network_of(load_dit(tmp_path / "old.pt")).shape.depth == SHAPE.depth


def saved_by_comfyui(model) -> dict[str, torch.Tensor]:
    """Returns the weights as ComfyUI saves them. Newer hosts let the patcher gather them."""
    return (model if hasattr(model, "state_dict_for_saving") else model.model).state_dict_for_saving()


def test_what_comfyui_saves_is_loaded_again(tmp_path):
    model = dit()
    path = saved(tmp_path / "saved.safetensors", saved_by_comfyui(model))
    assert shapes_of(network_of(load_dit(path)).state_dict()) == shapes_of(network_of(model).state_dict())


@pytest.mark.parametrize("places", ["none", "not square"])
def test_a_table_of_places_that_does_not_help_is_computed(tmp_path, places):
    weights = weights_of()
    there = weights.pop("pos_embed")
    if places == "not square":
        weights["pos_embed"] = torch.full((1, 15, 64), torch.nan)
    network = network_of(load_dit(saved(tmp_path / "a.safetensors", weights)))
    assert network.pos_embed is None
    torch.testing.assert_close(network._places(8, 8, there), there, atol=1e-6, rtol=0)


class Program:
    def __reduce__(self):
        return (exec, ("raise SystemExit('it ran')",))


def without(name: str) -> dict:
    return {key: weight for key, weight in weights_of().items() if key != name}


FOREIGN = {
    "another model": ({"double_blocks.0.img_attn.qkv.weight": torch.zeros(2)}, "it has no x_embedder.proj.weight"),
    "PixArt": (lambda: dict(network_of(EXTRA_MODELS[1].make()).state_dict()), "it has no "),
    "a layer is missing": (lambda: without("blocks.1.attn.proj.bias"), "it has no blocks.1.attn.proj.bias"),
    "more than a DiT": (lambda: {**weights_of(), "blocks.0.attn.q_norm.weight": torch.ones(2)}, "it also has blocks.0.attn.q_norm.weight"),
    "other latents": (lambda: {**weights_of(), "x_embedder.proj.weight": torch.zeros(64, 16, 2, 2)}, "its latents have 16 channels"),
    "no convolution": (lambda: {**weights_of(), "x_embedder.proj.weight": torch.zeros(64, 16)}, "of another shape than a DiT's: x_emb"),
    "a wrong shape": (lambda: {**weights_of(), "blocks.2.mlp.fc2.weight": torch.zeros(64, 9)}, "blocks.2.mlp.fc2.weight is 64x9 and not"),
    "an odd output": (lambda: weights_of(out_channels=3), "it predicts 3 channels for 4"),
    "no size of a DiT": (lambda: weights_of(width=48, mlp_width=192), "its tokens have 48 channels"),
}  # fmt: skip


@pytest.mark.parametrize("what", FOREIGN)
@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_foreign_files_are_refused_before_weights_are_read(tmp_path, monkeypatch, what, suffix):
    content, words = FOREIGN[what]
    path = saved(tmp_path / f"foreign{suffix}", content() if callable(content) else content)
    monkeypatch.setattr(dit_model, "DiTConfig", None)
    with pytest.raises(ValueError, match="foreign") as refused:
        load_dit(path)
    assert f"foreign{suffix} is not a class-conditional DiT: {words}" in str(refused.value)


DAMAGED = {
    "a pickle with a program": (
        "a.pt",
        lambda: pickle.dumps({"ema": Program()}, protocol=2),
        "holds more than weights .*could run a program",
    ),
    "text": ("a.pt", lambda: b"not a pickle at all", "a.pt cannot be read"),
    "nothing": ("a.pt", lambda: b"", "a.pt cannot be read"),
    "text as safetensors": ("a.safetensors", lambda: b"<html>404</html>" * 9, "a.safetensors cannot be read"),
    "cut off": ("a.safetensors", lambda: safetensors.torch.save(weights_of())[:-100], "a.safetensors cannot be read"),
    "a list": ("a.pt", lambda: pickle.dumps([1, 2], protocol=2), "cannot be read|it has no names"),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_damaged_and_dangerous_files_are_refused(tmp_path, what):
    name, content, words = DAMAGED[what]
    (tmp_path / name).write_bytes(content())
    with pytest.raises(ValueError, match=words):
        load_dit(tmp_path / name)


def test_a_program_in_a_file_of_torch_is_refused(tmp_path):
    torch.save({"ema": weights_of(), "args": Program()}, tmp_path / "a.pt")
    with pytest.raises(SystemExit, match="it ran"):  # the program is a real one
        torch.load(tmp_path / "a.pt", weights_only=False)
    with pytest.raises(ValueError, match=r"holds more than weights \([\w.]*exec\)"):
        load_dit(tmp_path / "a.pt")

"""The pack's own DiT: its network agrees with a plain one and its sampling with DDIM by hand, and its nodes work."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import comfy.sample
import folder_paths
import pytest
import torch
from comfyui_duca.nodes import load_dit as load_node
from comfyui_duca.nodes.dit.model import NO_CLASS, DiTConfig, memory_factor
from comfyui_duca.nodes.dit.network import DiT
from comfyui_duca.nodes.duca_cache import DucaCache
from comfyui_duca.nodes.imagenet_class import ImageNetClass, class_conditioning
from comfyui_duca.nodes.load_dit import LoadDiT
from runs import kinds, report_of, sample
from zoo_dit import CASES, SHAPE, assert_near, dit, network_of, normal, plain_of, saved, weights_of

import nodes as host_nodes

LABELS = torch.tensor([3, 10])  # the last one is the null class


# --- the network


@pytest.mark.parametrize("changes", [{}, {"out_channels": 4}, {"patch": 4, "grid": 4}])
@pytest.mark.parametrize("size", [(16, 16), (24, 8)])
def test_the_network_is_the_plain_one(changes, size):
    network = network_of(dit(**changes))
    x, t = normal(1, 2, 4, *size), torch.tensor([981.0, 1.0])
    side = network.shape.patch
    expected = plain_of(network, size[0] // side, size[1] // side).raw(x.double(), t, LABELS)
    with torch.inference_mode():
        assert_near(network(x, t, LABELS), expected[:, :4])


def test_odd_sizes_are_filled_up():
    case = CASES[0]._replace(latent=(4, 11, 13))
    assert sample(case, dit()).shape == (1, 4, 11, 13)


def test_the_checkpoints_own_places_are_used_where_they_fit():
    network = network_of(dit())
    network.pos_embed.data += 0.5
    x, t = normal(1, 2, 4, 16, 16), torch.tensor([500.0, 500.0])
    with torch.inference_mode():
        assert_near(network(x, t, LABELS), plain_of(network).raw(x.double(), t, LABELS)[:, :4])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_small_weights_are_cast_by_the_host(dtype):
    """Weights are rounded when they are loaded and arithmetic stays in float32. The table of positions is not rounded."""
    exact = network_of(dit())
    config = DiTConfig({"shape": SHAPE})
    config.set_inference_dtype(dtype, torch.float32)
    model = config.get_model({})
    model.load_model_weights({name: weight.clone() for name, weight in exact.state_dict().items()})
    assert model.diffusion_model.blocks[0].mlp.fc1.weight.dtype == dtype and torch.equal(model.diffusion_model.pos_embed, exact.pos_embed)
    for name, weight in exact.named_parameters():
        weight.data = weight.data if name == "pos_embed" else weight.data.to(dtype).float()
    x, t = normal(1, 2, 4, 16, 16), torch.tensor([500.0, 20.0])
    with torch.inference_mode():
        assert_near(model.diffusion_model(x, t, LABELS), plain_of(exact).raw(x.double(), t, LABELS)[:, :4])


@pytest.mark.parametrize("is_partial", [False, True])
def test_loras_and_partial_loads_are_the_hosts(is_partial):
    model, changed = dit(), dit()
    keys = [f"diffusion_model.{name}.weight" for name in ("blocks.1.attn.qkv", "blocks.2.adaLN_modulation.1", "y_embedder.embedding_table")]
    patches = {key: ("diff", (0.1 * normal(i, *model.model.state_dict()[key].shape),)) for i, key in enumerate(keys)}
    for key in keys:
        network_of(changed).get_parameter(key.removeprefix("diffusion_model.")).data += patches[key][1][0]
    patched = model.clone()
    assert set(patched.add_patches(patches)) == set(keys)
    if is_partial:
        patched.load(torch.device("cpu"), lowvram_model_memory=1)
        assert patched.model.model_lowvram
    else:
        patched.load(torch.device("cpu"), full_load=True)
    x, t = normal(1, 2, 4, 16, 16), torch.tensor([500.0, 20.0])
    with torch.inference_mode():
        assert_near(network_of(patched)(x, t, LABELS), plain_of(network_of(changed)).raw(x.double(), t, LABELS)[:, :4])


def test_memory_is_estimated_in_proportion_to_pixart():
    published = SHAPE._replace(width=1152, patch=2)
    assert memory_factor(published) == 0.5 and memory_factor(published._replace(patch=4, width=576)) == 0.0625
    assert dit().model.memory_usage_factor == memory_factor(SHAPE)


# --- sampling


def ddim(network: DiT, noise: torch.Tensor, steps: int, guidance: float, label: int) -> torch.Tensor:
    """Samples DDIM without noise (eta 0) in float64, with betas in equal steps and the times of the host's ddim_uniform."""
    plain, kept = plain_of(network), torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), 0)
    times = list(range(1, 1000, 1000 // steps))[::-1]
    x = (1 - kept[times[0]]).sqrt() * noise.double()
    for time, then in zip(times, [*times[1:], None]):
        t = torch.full((len(x),), float(time))
        known, unknown = (plain.raw(x, t, torch.full((len(x),), y))[:, :4] for y in (label, network.shape.classes))
        eps, now, later = unknown + guidance * (known - unknown), kept[time], kept[then] if then is not None else torch.ones(())
        clean = (x - (1 - now).sqrt() * eps) / now.sqrt()
        x = later.sqrt() * clean + (1 - later).sqrt() * eps
    return x / 0.18215


@pytest.mark.parametrize("guidance, steps", [(1.0, 10), (4.0, 10), (4.0, 20)])
def test_the_hosts_sampler_is_ddim(guidance, steps):
    model, noise = dit(), normal(7, 2, 4, 16, 16)
    result = comfy.sample.sample(
        model, noise, steps, guidance, "ddim", "ddim_uniform", class_conditioning(3), class_conditioning(NO_CLASS),
        torch.zeros_like(noise), disable_pbar=True, seed=1,
    )  # fmt: skip
    expected = ddim(network_of(model), noise, steps, guidance, 3)
    assert_near(result, expected, 1e-4)
    assert (expected - ddim(network_of(model), noise, steps, guidance, 5)).abs().max() / expected.abs().max() > 1e-2


def test_text_is_no_class_and_the_user_is_told():
    with pytest.raises(ValueError, match="connect ImageNet Class"):
        sample(CASES[0]._replace(cond=lambda seed: [[torch.zeros(1, 77, 768), {}]]), dit())


@pytest.mark.parametrize("label", [11, -2])
def test_a_class_that_the_model_has_not_is_refused(label):
    with pytest.raises(ValueError, match=f"no class {label}: this DiT knows 0 to 9, and 10 for none"):
        sample(CASES[0]._replace(cond=lambda seed: class_conditioning(label)), dit())


def test_the_null_class_is_the_last_of_the_table():
    model = dit()
    results = [sample(CASES[0]._replace(cond=lambda seed, label=label: class_conditioning(label)), model) for label in (NO_CLASS, 10, 9)]
    assert torch.equal(*results[:2]) and not torch.equal(*results[1:])


def test_classes_are_scheduled_and_masked_as_prompts_are():
    """The class is 3 at first and then 5; or 5 in the left half only."""
    first, second = (host_nodes.ConditioningSetTimestepRange().set_range(class_conditioning(y), *part)[0]
                     for y, part in ((3, (0.0, 0.5)), (5, (0.5, 1.0))))  # fmt: skip
    masked = host_nodes.ConditioningSetMask().append(class_conditioning(5), torch.eye(2)[:1].repeat_interleave(64, 1), "default", 1.0)[0]
    conds = [first + second, class_conditioning(3) + masked, class_conditioning(3), class_conditioning(5)]
    model = dit()
    results = [sample(CASES[0]._replace(cond=lambda seed, cond=cond: cond), model) for cond in conds]
    assert all(torch.isfinite(result).all() for result in results)
    assert not any(torch.equal(result, other) for i, result in enumerate(results) for other in results[:i])


# --- nodes


@pytest.fixture
def folders(tmp_path, monkeypatch) -> Path:
    """Makes model folders of the host's own kinds, empty."""
    known = {kind: ([str(tmp_path / kind)], folder_paths.supported_pt_extensions) for kind in ("diffusion_models", "checkpoints")}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", {**folder_paths.folder_names_and_paths, **known})
    monkeypatch.setattr(folder_paths, "filename_list_cache", {})
    for kind in known:
        (tmp_path / kind / "inner").mkdir(parents=True)
    return tmp_path


def test_files_of_both_folders_are_listed(folders):
    for name in ("diffusion_models/a.pt", "diffusion_models/inner/b.safetensors", "checkpoints/a.pt", "checkpoints/c.ckpt"):
        (folders / name).touch()
    assert load_node.names() == ["a.pt", str(Path("inner") / "b.safetensors")]
    assert LoadDiT.define_schema().inputs[0].options == load_node.names()
    with pytest.raises(ValueError, match=r"gone.pt is neither in .*press R"):
        LoadDiT.execute("gone.pt")


@pytest.mark.parametrize("mode, expected", [("auto", "a"), ("forecast", "a"), ("paper", "c"), ("off", "")])
def test_the_duca_cache_node_on_a_loaded_file(folders, monkeypatch, mode, expected):
    saved(folders / "checkpoints" / "tiny.pt", {"ema": weights_of()})
    (model,) = LoadDiT.execute("tiny.pt").result
    positive, negative = ImageNetClass.execute(4).result
    monkeypatch.setattr(DucaCache, "hidden", SimpleNamespace(unique_id=None))
    values = {
        "mode": mode, "speedup": 2.0, "predictor": "chebyshev", "cycle_length": 0, "token_share": 0.1, "warmup": -1, "tail": 0,
        "start_percent": 0.0, "end_percent": 1.0, "store_device": "auto", "store_dtype": "model dtype", "token_seed": 0, "verbose": False,
    }  # fmt: skip
    (cached,) = DucaCache.execute(model=model, **values).result

    def drawn(used) -> torch.Tensor:
        latent = {"samples": torch.zeros(1, 4, 16, 16)}
        return host_nodes.common_ksampler(used, 1, 12, 4.0, "ddim", "ddim_uniform", positive, negative, latent)[0]["samples"]

    plain, result = drawn(model), drawn(cached)
    assert torch.isfinite(result).all() and torch.equal(result, plain) == (mode == "off")
    if expected:
        assert expected in kinds(cached) and kinds(cached).count("F") < 12 and not report_of(cached).notices
        assert report_of(cached).family == "dit"


def test_a_class_by_link_is_checked():
    with pytest.raises(ValueError, match="class_number is 1001"):
        ImageNetClass.execute(1001)

"""A loaded model's checkpoint is recognised whatever patches are on it, in every dtype and packing."""

from __future__ import annotations

import gc
import inspect
import json
import weakref

import comfy.hooks
import comfy.model_management
import comfy.ops
import pytest
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import PatcherInjection
from comfyui_duca.cache_core.calibration.fingerprint import Fingerprint
from comfyui_duca.nodes.demo_flux import load_demo_model
from comfyui_duca.nodes.sidecars import fingerprint_of, fingerprints
from helpers.sampling import change_for_all, load, patcher_of, perturbed, sample, with_lora
from torch import Tensor, nn

CPU = torch.device("cpu")


@pytest.fixture
def model():
    """Returns a new model for each test, as what is loaded stays loaded."""
    yield load_demo_model()
    comfy.model_management.unload_all_models()


def as_they_lie(model: ModelPatcher) -> Fingerprint:
    """Returns the fingerprint of the weights that the network holds at the moment."""
    return Fingerprint.of(model.model.diffusion_model.named_parameters())


def same(a: Fingerprint, b: Fingerprint) -> bool:
    """Returns whether both have exactly the same numbers: removing a LoRA leaves no rounding."""
    return (a.structure, a.dtype) == (b.structure, b.dtype) and torch.equal(a.values, b.values)


def test_it_is_that_of_the_weights(model, of_demo):
    assert same(as_they_lie(model), of_demo)
    matrices = [name for name, w in model.model.diffusion_model.named_parameters() if w.dim() > 1]
    assert of_demo.values.shape == (len(matrices), 64) and len(matrices) < 64 and of_demo.dtype == "float32"


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
    """A layer that does not fit into memory gets a function in place of a patch; a layer that fits is patched."""
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
    """Scheduled LoRAs are added while sampling, on top of the LoRAs that were loaded."""
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


@pytest.mark.skipif(
    not hasattr(comfy.ops, "scaled_fp8_ops"), reason="this host loads scaled fp8 as its own quantised layers: the next test"
)
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


def quantised_layers(formats: dict) -> tuple[Layers, dict[str, Tensor]]:
    """Returns layers of the host's quantised kind, and what a checkpoint holds besides weights if it says which layer has which format."""
    if "quant_config" not in inspect.signature(comfy.ops.mixed_precision_ops).parameters:
        return Layers(comfy.ops.mixed_precision_ops(formats, torch.bfloat16).Linear), {}
    marks = {f"{name}.comfy_quant": torch.tensor(list(json.dumps(said).encode()), dtype=torch.uint8) for name, said in formats.items()}
    return Layers(comfy.ops.mixed_precision_ops({}, torch.bfloat16).Linear), marks


def test_quantised_layers_of_the_host():
    dense = dense_layers()
    formats = {f"layers.{i}": {"format": "float8_e4m3fn"} for i in range(2)}
    quantised, marks = quantised_layers(formats)
    state = marks | {name: w.detach().bfloat16() for name, w in dense.named_parameters()}
    for name in formats:
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
    """Holds bytes that report the weight's shape, with LoRAs beside them, as GGUF's do. Here one byte is one value."""

    @staticmethod
    def of(weight: Tensor) -> Packed:
        packed = (weight.detach() * 64).round().clamp(-127, 127).to(torch.int8).view(torch.uint8).reshape(-1)
        packed = torch.cat((packed, packed.new_zeros(7))).as_subclass(Packed)  # the shape cannot be computed from the size
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
    fingerprints._known.clear()
    assert same(fingerprint_of(other), taken) and all(len(weight.patches) == 1 for weight in weights)


def test_packed_weights_of_unknown_make_do_not_count():
    layers = dense_layers()
    without = Fingerprint.of((name, w) for name, w in layers.named_parameters() if name != "layers.0.weight")
    layers.layers[0].weight = nn.Parameter(torch.zeros(200, dtype=torch.uint8), requires_grad=False)
    assert same(fingerprint_of(patcher_of(layers)), without)
    with pytest.raises(ValueError):
        fingerprint_of(patcher_of(nn.Linear(2, 2)))


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
    network, known = weakref.ref(other.model.diffusion_model), len(fingerprints._known)
    del other
    gc.collect()
    assert network() is None and len(fingerprints._known) < known

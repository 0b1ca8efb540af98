"""Increment-calibrated caching: factors, what is kept, what a calibrated evaluation answers, and what it costs."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core.calibration import low_rank
from comfyui_duca.cache_core.calibration.low_rank import Magnitudes, dense_weight, factorise, factorise_sites, measuring
from comfyui_duca.cache_core.engine import EngineCall, Slot, TokenChoice, listening
from comfyui_duca.cache_core.engine.linears import (
    LinearSite,
    anchor_macs,
    calibrated,
    check_factors,
    dense_macs,
    find_linears,
    icc_bytes,
    icc_macs,
    listening_linears,
)
from comfyui_duca.cache_core.families.base import UnsupportedCallError
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.families.flux_linears import FLUX_LINEARS, WHOLE, LinearPart, StackLinears
from comfyui_duca.cache_core.kinds import Kind
from comfyui_duca.cache_core.store import FeatureStore, StoreFormat
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from reference_flux import ReferenceFlux
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
LENGTHS = {"img": 192, "txt": 12}


@pytest.fixture(scope="module")
def network():
    return load_demo_model().model.diffusion_model


@pytest.fixture(scope="module")
def sites(network):
    return find_linears(FLUX, network, FLUX_LINEARS)


@pytest.fixture(scope="module")
def full_factors(sites):
    return factorise_sites(sites, 10**6, "svd", None, torch.float32, CPU)


@pytest.fixture(scope="module")
def small_factors(sites):
    return factorise_sites(sites, 8, "svd", None, torch.float32, CPU)


class Driver:
    """The evaluations of a run over some conds, without a plan: one slot per cond."""

    def __init__(self, network, sites, factors, conds="ab", fmt=StoreFormat()):
        self.network, self.sites, self.factors = network, sites, factors
        self.store = FeatureStore(fmt)
        self.slots = {cond: Slot(self.store, 1) for cond in conds}

    def call(self, conds, sigma) -> EngineCall:
        return EngineCall(
            model=self.network, family=FLUX, slots=[self.slots[c] for c in conds], time=sigma, choice=TokenChoice(0.0, 0),
            keeps_sublayers=False, keeps_input=False, on_enter=lambda _call, _tokens: None,
        )  # fmt: skip

    @torch.inference_mode()
    def full(self, conds, sigma, x, context, y):
        call = self.call(conds, sigma)
        with listening(call), listening_linears(call, self.sites, self.factors):
            return self.network(x.clone(), torch.full((x.shape[0],), sigma), context.clone(), y)

    @torch.inference_mode()
    def icc(self, conds, sigma, x, context, y):
        call = self.call(conds, sigma)
        with calibrated(call, self.sites, self.factors, self.store):
            result = self.network(x.clone(), torch.full((x.shape[0],), sigma), context.clone(), y)
        assert call.is_touched and call.is_finished
        return result


def inputs(seed: int, size=(48, 64)):
    (context, extra), (context2, extra2) = encode_prompt("red apple")[0], encode_prompt("tiger face")[0]
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    return x, torch.cat((context, context2)), torch.cat((extra["pooled_output"], extra2["pooled_output"]))


def rows(values, at: slice):
    return tuple(value[at] for value in values)


def assert_near(result, expected, tolerance=2e-5):
    assert (result.double() - expected.double()).abs().max() / expected.abs().max() < tolerance


# -- factors ------------------------------------------------------------------------------------------------------------------


def reference_product(weight, rank, method, in_magnitude, out_magnitude):
    """A·B in float64, written from METHOD section 2."""
    left, right = np.ones(weight.shape[0]), np.ones(weight.shape[1])
    if method != "svd":
        left, right = out_magnitude**0.5, in_magnitude**0.5
        left, right = np.maximum(left, left.max() / 1000), np.maximum(right, right.max() / 1000)
    u, s, vt = np.linalg.svd(np.diag(left) @ weight @ np.diag(right), full_matrices=False)
    u, s, vt = u[:, :rank], s[:rank], vt[:rank]
    return np.diag(1 / left) @ u @ np.diag(s) @ vt @ np.diag(1 / right)


@pytest.mark.parametrize("method", low_rank.METHODS)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_factors_are_those_of_the_paper(method, shape, rank, dtype):
    random = np.random.default_rng(sum(shape) + rank)
    weight, r, l = random.normal(size=shape), random.exponential(size=shape[1]), random.exponential(size=shape[0])  # noqa: E741
    if dtype is torch.float64:
        r[0] = 0.0  # met by the floor; in float32 its digits are a thousand times fewer
    a, b, energy = factorise(torch.tensor(weight, dtype=dtype), rank, method, torch.tensor(r), torch.tensor(l))
    kept = min(rank, *shape)
    assert a.shape == (shape[0], kept) and b.shape == (kept, shape[1]) and a.dtype == b.dtype == dtype
    expected = reference_product(weight, rank, method, r, l)
    tolerance = 1e-5 if dtype is torch.float32 else 1e-10
    assert np.abs((a @ b).numpy() - expected).max() < tolerance * np.abs(expected).max()
    assert 0 < energy <= 1 and (kept < min(shape) or energy == pytest.approx(1))


def test_channel_weights_are_the_square_root_with_a_floor():
    weights = low_rank.channel_weights(torch.tensor([4.0, 1.0, 0.0, 1e-9]))
    assert weights.tolist() == pytest.approx([2.0, 1.0, 0.002, 0.002])
    assert low_rank.channel_weights(torch.zeros(2)).tolist() == [1.0, 1.0]


def test_energy_by_hand():
    """diag(3, 4, 0) at rank 1 keeps 16 of 25."""
    a, b, energy = factorise(torch.diag(torch.tensor([3.0, 4.0, 0.0])), 1)
    assert energy == pytest.approx(16 / 25)
    torch.testing.assert_close(a @ b, torch.diag(torch.tensor([0.0, 4.0, 0.0])))


def test_subspace_iteration_is_close_repeatable_and_leaves_the_random_state():
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1100, 60, generator=generator) @ torch.randn(60, 1040, generator=generator)
    weight += 0.5 * torch.randn(1100, 1040, generator=generator)
    state = torch.get_rng_state()
    first, second = factorise(weight, 48, exact=False), factorise(weight, 48, exact=False)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.a, second.a) and torch.equal(first.b, second.b)
    best = (weight - factorise(weight, 48).a @ factorise(weight, 48).b).norm()
    assert best <= (weight - first.a @ first.b).norm() * (1 + 1e-5) <= best * 1.001
    with pytest.raises(AssertionError):  # it really is another algorithm than the exact one
        torch.testing.assert_close(first.a.abs(), factorise(weight, 48).a.abs(), rtol=0, atol=0)


def test_wrong_methods_and_missing_magnitudes_are_refused(sites):
    with pytest.raises(ValueError, match="unknown method"):
        factorise(torch.eye(3), 1, "pca")
    with pytest.raises(ValueError, match="magnitudes"):
        factorise(torch.eye(3), 1, "ca_svd")
    with pytest.raises(ValueError, match="at least 1"):
        factorise(torch.eye(3), 0)
    with pytest.raises(ValueError, match="increments"):
        factorise_sites(sites[:1], 4, "cd_svd", Magnitudes(), torch.float32, CPU)
    with pytest.raises(ValueError, match="not of increments"):
        factorise_sites(sites[:1], 4, "ca_svd", Magnitudes(increments=True), torch.float32, CPU)
    with pytest.raises(ValueError, match="were measured"):
        factorise_sites(sites[:1], 4, "ca_svd", Magnitudes(), torch.float32, CPU)


# -- dense weights ------------------------------------------------------------------------------------------------------------


class Quantised(nn.Module):
    """int8 weights, one scale per output; nothing here looks like nn.Linear but the two sizes."""

    def __init__(self, inputs=40, outputs=24):
        super().__init__()
        self.in_features, self.out_features = inputs, outputs
        generator = torch.Generator().manual_seed(3)
        self.codes = torch.randint(-127, 128, (outputs, inputs), dtype=torch.int8, generator=generator)
        self.scales = 0.01 * torch.rand(outputs, 1, generator=generator)

    def forward(self, x):
        assert x.ndim == 3
        return nn.functional.linear(x, (self.codes * self.scales).to(x.dtype))


class Patched(nn.Linear):
    """A LoRA added in forward."""

    def forward(self, x):
        return super().forward(x) + 0.3 * (x @ self.down.T) @ self.up.T


class ClippedInput(nn.Linear):
    """Scaled fp8 activations: inputs beyond 448 steps are clamped, in place, the rest is rounded to 3 binary digits."""

    def forward(self, x):
        x.clamp_(-4.48, 4.48)
        return super().forward((x / 0.01).to(torch.float8_e4m3fn).to(x.dtype) * 0.01)


def linear(kind=nn.Linear, inputs=40, outputs=24, bias=1.0):
    torch.manual_seed(5)
    module = kind(inputs, outputs)
    module.bias.data.mul_(bias)
    return module


@pytest.mark.parametrize("chunk", [7, 40, 1024])
def test_dense_weight_of_a_linear_with_bias(chunk):
    module = linear()
    torch.testing.assert_close(dense_weight(module, torch.float32, CPU, chunk), module.weight.detach(), rtol=1e-6, atol=1e-7)


def test_dense_weight_of_dequantising_and_patched_layers():
    module = Quantised()
    torch.testing.assert_close(dense_weight(module, torch.float32, CPU, 16), module.codes * module.scales)
    module = linear(Patched)
    module.down, module.up = torch.randn(2, 40), torch.randn(24, 2)
    torch.testing.assert_close(dense_weight(module, torch.float32, CPU, 16), (module.weight + 0.3 * module.up @ module.down).detach())


def test_dense_weight_keeps_half_precision_digits_under_a_large_bias():
    """A bias 100 times the weights would leave 2 of 8 binary digits of module(I) - module(0)."""
    module = linear(bias=100.0).bfloat16()
    weight = module.weight.detach().float()
    error = (dense_weight(module, torch.bfloat16, CPU) - weight).abs().max() / weight.abs().max()
    naive = module(torch.eye(40, dtype=torch.bfloat16)[None])[0] - module(torch.zeros(1, 1, 40, dtype=torch.bfloat16))[0]
    assert error < 2**-8 < 0.15 < (naive.T.float() - weight).abs().max() / weight.abs().max()


def test_dense_weight_sees_through_clipped_inputs_and_refuses_what_is_not_linear():
    module = linear(ClippedInput, inputs=200)
    weight = dense_weight(module, torch.float32, CPU)
    assert (weight - module.weight).norm() / module.weight.norm() < 0.01
    bent = linear()
    bent.register_forward_hook(lambda _module, _args, result: result.abs())
    with pytest.raises(ValueError, match="not answer as a linear"):
        dense_weight(bent, torch.float32, CPU)


def test_a_layer_of_zeros_has_a_weight_of_zeros():
    module = linear()
    module.weight.data.zero_()
    assert not dense_weight(module, torch.float32, CPU).any()


def test_factorised_sites_and_one_dense_layer_at_a_time(sites, monkeypatch):
    alive, most, told = [], [], []
    original = dense_weight

    def counted(*args, **kwargs):
        gc.collect()
        most.append(sum(ref() is not None for ref in alive))
        weight = original(*args, **kwargs)
        alive.append(weakref.ref(weight))
        return weight

    monkeypatch.setattr(low_rank, "dense_weight", counted)
    chosen = [site for site in sites if site.index == 0]
    factors = factorise_sites(
        chosen, 4, "svd", None, torch.bfloat16, CPU, lambda done, of: told.append((done, of)), call_dtype=torch.float32
    )
    assert len(most) == len(chosen) == 10 and max(most) == 0
    assert told == [(i, 10) for i in range(1, 11)]
    check_factors(chosen, factors)
    expected = {f"{site.key(part)}.{letter}" for site in chosen for part in site.parts for letter in "AB"}
    assert set(factors) == expected
    for tensor in factors.values():  # none is a view that keeps a whole decomposition
        assert tensor.dtype is torch.bfloat16 and tensor.untyped_storage().nbytes() == tensor.nbytes


def test_parts_are_factorised_apart(network, sites):
    """Literal slices of the weights: q, k, v, mlp of outputs, attn, mlp of inputs."""
    factors = factorise_sites([s for s in sites if s.index == 1], 16, "svd", None, torch.float32, CPU)
    qkv, block = network.double_blocks[1].img_attn.qkv.weight.detach(), network.single_blocks[1]
    linear1, linear2 = block.linear1.weight.detach(), block.linear2.weight.detach()
    parts = {
        "double_blocks.1.img_attn.qkv.k": qkv[256:512],
        "single_blocks.1.linear1.v": linear1[512:768],
        "single_blocks.1.linear1.mlp": linear1[768:],
        "single_blocks.1.linear2.attn": linear2[:, :256],
        "single_blocks.1.linear2.mlp": linear2[:, 256:],
    }
    for name, weight in parts.items():
        product = factors[f"{name}.A"] @ factors[f"{name}.B"]
        assert np.abs(product.numpy() - reference_product(weight.numpy(), 16, "svd", None, None)).max() < 1e-5


# -- magnitudes ---------------------------------------------------------------------------------------------------------------


def toy_site(inputs=2, outputs=3, layer="toy"):
    return LinearSite("blocks", 0, layer, linear(inputs=inputs, outputs=outputs), (WHOLE,), "img", inputs, outputs)


def test_magnitudes_by_hand():
    site, magnitudes = toy_site(), Magnitudes()
    magnitudes.add(site, "a", torch.tensor([[[1.0, -2.0], [3.0, 4.0]]]), torch.ones(1, 2, 3))
    magnitudes.add(site, "b", torch.tensor([[[-5.0, 0.0]]]), -4 * torch.ones(1, 1, 3))
    inputs, outputs = magnitudes.means(site)
    assert inputs.dtype is torch.float64
    assert inputs.tolist() == [3.0, 2.0]  # (1 + 3 + 5) / 3, (2 + 4 + 0) / 3
    assert outputs.tolist() == [2.0, 2.0, 2.0]


def test_increments_by_hand():
    """Each cond is compared with itself, never across runs or shapes, and only tokens 0 and 3 of 4 are kept."""
    site, magnitudes = toy_site(1, 1), Magnitudes(increments=True, tokens=2)

    def add(cond, *values):
        x = torch.tensor(values)[None, :, None]
        magnitudes.add(site, cond, x, 10 * x)

    add("a", 0.0, 99.0, 99.0, 1.0)
    add("b", 100.0, 0.0, 0.0, 100.0)
    add("a", 2.0, 0.0, 0.0, -3.0)  # 2 and 4
    add("b", 100.0, 7.0, 7.0, 102.0)  # 0 and 2
    magnitudes.begin_run()
    add("a", 50.0, 50.0, 50.0, 50.0)
    add("a", 1.0)
    assert [float(mean) for mean in magnitudes.means(site)] == [2.0, 20.0]


def test_measuring_hears_every_layer_before_it_is_clamped(network, sites):
    x, context, y = inputs(0)
    plain, steps = Magnitudes(), Magnitudes(increments=True)
    seen = {}
    hooks = [s.module.register_forward_hook(lambda _m, args, r, s=s: seen.setdefault(s.name, []).append((args[0], r))) for s in sites]
    with torch.inference_mode():
        for sigma in (0.9, 0.8):
            with measuring(("a", "b"), sites, plain, steps):
                network(x.clone(), torch.full((2,), sigma), context, y)
    for hook in hooks:
        hook.remove()
    for site in sites:
        for side in (0, 1):
            first, second = (pair[side].double() for pair in seen[site.name])
            assert_near(plain.means(site)[side], (first.abs() + second.abs()).mean((0, 1)) / 2, 1e-6)
            assert_near(steps.means(site)[side], (second - first).abs().mean((0, 1)), 1e-6)
    clamping = LinearSite("blocks", 0, "toy", linear(ClippedInput), (WHOLE,), "img", 40, 24)
    heard = Magnitudes()
    with measuring(("a",), [clamping], heard):
        clamping.module(torch.full((1, 3, 40), 100.0))
    assert heard.means(clamping)[0].tolist() == [100.0] * 40


# -- where the layers are -----------------------------------------------------------------------------------------------------


def test_all_linears_but_modulation_are_found(network, sites):
    assert len(sites) == 3 * 8 + 6 * 2
    double = ["attn.qkv", "attn.proj", "mlp.0", "mlp.2"]
    assert {s.layer for s in sites if s.stack == "double_blocks"} == {f"{stream}_{name}" for stream in ("img", "txt") for name in double}
    assert {s.layer for s in sites if s.stack == "single_blocks"} == {"linear1", "linear2"}
    by_name = {site.name: site for site in sites}
    fused = by_name["single_blocks.5.linear1"]
    assert [fused.key(part) for part in fused.parts] == [f"single_blocks.5.linear1.{name}" for name in ("q", "k", "v", "mlp")]
    assert [fused.outputs(part) for part in fused.parts] == [256, 256, 256, 1024]
    assert [by_name["single_blocks.0.linear2"].inputs(part) for part in by_name["single_blocks.0.linear2"].parts] == [256, 1024]
    assert [by_name[f"double_blocks.0.{s}_mlp.0"].stream for s in ("img", "txt")] == ["img", "txt"] and fused.stream == "txt+img"
    assert fused.ranks(300) == [256, 256, 256, 256]
    assert by_name["double_blocks.0.img_mlp.0"].parts == (WHOLE,)


def test_wrapped_layers_are_one_and_undescribed_ones_are_refused(network):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.in_features, self.out_features = inner, inner.in_features, inner.out_features

    block = network.single_blocks[0]
    before, block.linear2 = block.linear2, Wrapper(block.linear2)
    try:
        found = [s for s in find_linears(FLUX, network, FLUX_LINEARS) if s.stack == "single_blocks" and s.index == 0]
        assert [site.layer for site in found] == ["linear1", "linear2"]
        assert found[1].module is block.linear2
    finally:
        block.linear2 = before
    with pytest.raises(ValueError, match="single_blocks are not described"):
        find_linears(FLUX, network, FLUX_LINEARS[:1])
    with pytest.raises(ValueError, match="no token stream"):
        find_linears(FLUX, network, (StackLinears("double_blocks", {"img_": "img"}), FLUX_LINEARS[1]))


def test_factors_of_another_model_are_refused(sites, small_factors):
    check_factors(sites, small_factors)
    key = "single_blocks.0.linear1.mlp"
    with pytest.raises(ValueError, match=f"no factors for {key}"):
        check_factors(sites, {name: f for name, f in small_factors.items() if name != f"{key}.B"})
    with pytest.raises(ValueError, match="another model"):
        check_factors(sites, small_factors | {f"{key}.A": torch.zeros(1000, 8)})


# -- evaluations --------------------------------------------------------------------------------------------------------------


def test_at_full_rank_the_uncached_model_is_reproduced(network, sites, full_factors):
    """Another noise level and another input than the anchor's; nothing is left of the approximation."""
    driver = Driver(network, sites, full_factors)
    with torch.inference_mode():
        expected = network(inputs(1)[0], torch.full((2,), 0.6), *inputs(1)[1:])
    uncached = driver.full("ab", 1.0, *inputs(0))
    assert torch.equal(uncached, driver.full("ab", 1.0, *inputs(0)))
    result = driver.icc("ab", 0.6, *inputs(1))
    assert (uncached - expected).abs().max() > 0.1 * expected.abs().max()  # there was something to correct
    assert_near(result, expected)


class ReferenceICC(ReferenceFlux):
    """The dense reference with every linear of the blocks as y_c + A·B·(x - x_c), once `factors` are given."""

    def __init__(self, model):
        super().__init__(model)
        self.anchors, self.factors = {}, None

    def linear(self, name, x):
        full = super().linear(name, x)
        if "_blocks" not in name or "mod" in name.split("blocks")[1]:
            return full
        if self.factors is None:
            self.anchors[name] = x, full
            return full
        x_c, y_c = self.anchors[name]
        return y_c + (x - x_c) @ self.low_rank(name).T

    def low_rank(self, name):
        pieces = {"qkv": "qkv", "linear1": ("q", "k", "v", "mlp"), "linear2": ("attn", "mlp")}
        parts = pieces.get(name.rsplit(".", 1)[1], ("all",))
        products = [self.factors[f"{name}.{part}.A"].double() @ self.factors[f"{name}.{part}.B"].double() for part in parts]
        return torch.cat(products, dim=1 if name.endswith("linear2") else 0)


def test_at_small_rank_every_linear_is_the_papers(network, sites, small_factors):
    """Two calibrated evaluations in a row from one anchor, against the paper's own form, which keeps x_c."""
    driver, reference = Driver(network, sites, small_factors), ReferenceICC(network)
    driver.full("ab", 1.0, *inputs(0))
    reference(inputs(0)[0], torch.ones(2), *inputs(0)[1:])
    reference.factors = small_factors
    kept = {key: feature.data.clone() for key, feature in driver.slots["a"].sublayers.items()}
    for seed, sigma in ((1, 0.7), (2, 0.4)):
        result = driver.icc("ab", sigma, *inputs(seed))
        assert_near(result, reference(inputs(seed)[0], torch.full((2,), sigma), *inputs(seed)[1:])[0])
        with torch.inference_mode():
            exact = network(inputs(seed)[0], torch.full((2,), sigma), *inputs(seed)[1:])
        assert (result - exact).abs().max() > 0.01 * exact.abs().max()  # rank 8 is far from exact
    assert all(torch.equal(driver.slots["a"].sublayers[key].data, value) for key, value in kept.items())
    assert driver.slots["a"].anchors[-1].time == 0.4  # the hidden state is this evaluation's


def test_conds_may_be_called_apart_together_and_in_any_order(network, sites, small_factors):
    together, apart = Driver(network, sites, small_factors), Driver(network, sites, small_factors)
    together.full("ab", 1.0, *inputs(0))
    for cond, at in (("a", slice(0, 1)), ("b", slice(1, 2))):
        apart.full(cond, 1.0, *rows(inputs(0), at))
    expected = together.icc("ab", 0.7, *inputs(1))
    swapped = apart.icc("ba", 0.7, *(value.flip(0) for value in inputs(1)))
    assert_near(swapped.flip(0), expected, 1e-5)
    assert_near(apart.icc("b", 0.7, *rows(inputs(1), slice(1, 2))), expected[1:], 1e-5)


def test_what_is_kept_of_a_layer_that_clamps_its_input(network):
    """z belongs to the input as the host gave it."""
    site = LinearSite(
        "blocks", 0, "toy", linear(ClippedInput), (LinearPart("p", cols=slice(0, 10)), LinearPart("q", cols=slice(10, 40))), "img", 40, 24
    )
    factors = {"blocks.0.toy.p.A": torch.zeros(24, 1), "blocks.0.toy.p.B": torch.ones(1, 10)}
    factors |= {"blocks.0.toy.q.A": torch.zeros(24, 2), "blocks.0.toy.q.B": torch.ones(2, 30)}
    driver = Driver(network, [site], factors, "a")
    call = driver.call("a", 1.0)
    call.lengths = {"img": 5, "txt": 0}
    with torch.inference_mode(), listening_linears(call, [site], factors):
        site.module(torch.full((1, 5, 40), 100.0))
    assert driver.slots["a"].sublayers[site.projection_key].data[0, 0].tolist() == [1000.0, 3000.0, 3000.0]


def test_unknown_calls_are_refused_and_nothing_is_written(network, sites, small_factors):
    driver = Driver(network, sites, small_factors)
    with pytest.raises(UnsupportedCallError, match="nothing of this shape"):
        driver.icc("ab", 0.7, *inputs(1))  # no anchor
    driver.full("ab", 1.0, *inputs(0))
    with pytest.raises(UnsupportedCallError, match="nothing of this shape"):
        driver.icc("ab", 0.7, *inputs(1, (32, 32)))
    site = sites[0]
    call = driver.call("ab", 0.7)
    call.lengths = LENGTHS
    with torch.inference_mode(), calibrated(call, sites, small_factors, driver.store):
        with pytest.raises(UnsupportedCallError, match="another shape"):
            site.module(torch.zeros(192, 256))
        with pytest.raises(UnsupportedCallError, match="another shape"):
            site.module(torch.zeros(2, 1, 256))
        site.module(torch.zeros(2, 192, 256))
        with pytest.raises(UnsupportedCallError, match="more than once"):
            site.module(torch.zeros(2, 192, 256))
    with torch.inference_mode(), listening_linears(call, sites, small_factors):  # the host's answer, kept once
        before = driver.slots["a"].sublayers[site.output_key]
        assert site.module(torch.zeros(192, 256)).shape == (192, 768)
        assert driver.slots["a"].sublayers[site.output_key] is before


def test_forwards_are_restored_also_after_an_error_inside_a_block(network, sites, small_factors):
    driver = Driver(network, sites, small_factors)
    modules = list(network.modules())
    before = [module.__dict__.get("forward") for module in modules]
    driver.full("ab", 1.0, *inputs(0))
    driver.icc("ab", 0.7, *inputs(1))
    assert [module.__dict__.get("forward") for module in modules] == before

    def fail(*_args):
        raise InterruptedError

    hook = network.single_blocks[2].mlp_act.register_forward_hook(fail)  # between linear1 and linear2
    try:
        for evaluate in (driver.full, driver.icc):
            with pytest.raises(InterruptedError):
                evaluate("ab", 0.5, *inputs(2))
        with pytest.raises(InterruptedError), torch.inference_mode(), measuring("ab", sites, Magnitudes()):
            network(inputs(0)[0], torch.ones(2), *inputs(0)[1:])
    finally:
        hook.remove()
    assert [module.__dict__.get("forward") for module in modules] == before


# -- costs --------------------------------------------------------------------------------------------------------------------


def test_costs_of_a_layer_by_hand():
    """10 tokens, 6 inputs, 9 outputs in two row parts of 3 and 6, rank 4: cut to 3 in the first."""
    parts = (LinearPart("a", rows=slice(0, 3)), LinearPart("b", rows=slice(3, None)))
    site = LinearSite("blocks", 0, "toy", nn.Identity(), parts, "txt+img", 6, 9)
    lengths = {"txt": 4, "img": 6}
    assert site.ranks(4) == [3, 4]
    assert dense_macs([site], lengths) == 10 * 54
    assert icc_macs([site], lengths, 4) == 10 * (3 * (6 + 3) + 4 * (6 + 6))
    assert anchor_macs([site], lengths, 4) == 10 * (3 + 4) * 6
    assert icc_bytes([site], lengths, 4, torch.bfloat16) == 10 * (9 + 7) * 2
    assert icc_bytes([site], lengths, 4, torch.bfloat16, StoreFormat(dtype=torch.float8_e4m3fn)) == 10 * (9 + 4 + 7 + 4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float8_e4m3fn], ids=["model", "bf16", "fp8"])
def test_bytes_are_those_kept(network, sites, small_factors, dtype):
    driver = Driver(network, sites, small_factors, fmt=StoreFormat(dtype=dtype))
    driver.full("ab", 1.0, *inputs(0))
    driver.full("ab", 0.9, *inputs(1))  # memory is used again
    kept = driver.store.bytes - 2 * 192 * driver.store.format.bytes_per_token(256, torch.float32)  # without the hidden states
    for ranks in (8, small_factors):
        assert kept == 2 * icc_bytes(sites, LENGTHS, ranks, torch.float32, driver.store.format)
    driver.icc("ab", 0.8, *inputs(2))
    assert driver.store.bytes == driver.store.peak_bytes


def test_macs_are_those_torch_counts(network, sites, small_factors):
    """Embedding, modulation and attention are a full evaluation's; only the linears of the blocks are cheaper."""
    driver = Driver(network, sites, small_factors)

    def counted(evaluate, *arguments):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            evaluate(*arguments)
        return counter.get_total_flops() / 2 / 2  # flops to multiply-adds, two rows

    full = FLUX.macs(network, LENGTHS, Kind.FULL, 0.0) + FLUX.outside_macs(network, LENGTHS)
    anchor = full + anchor_macs(sites, LENGTHS, 8)
    assert counted(driver.full, "ab", 1.0, *inputs(0)) == pytest.approx(anchor, rel=1e-3)
    expected = full - dense_macs(sites, LENGTHS) + icc_macs(sites, LENGTHS, 8)
    assert counted(driver.icc, "ab", 0.7, *inputs(1)) == pytest.approx(expected, rel=1e-3)
    assert icc_macs(sites, LENGTHS, small_factors) == icc_macs(sites, LENGTHS, 8)

"""Low-rank factors for increment-calibrated caching: dense weights of any layer, channel magnitudes, the three decompositions."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core.calibration import low_rank
from comfyui_duca.cache_core.calibration.low_rank import Magnitudes, dense_weight, factorise, factorise_sites, measuring
from comfyui_duca.cache_core.engine.linear_sites import LinearSite, check_shapes
from comfyui_duca.cache_core.families.linears import WHOLE
from comfyui_duca.nodes.demo_flux import encode_prompt
from torch import nn

CPU = torch.device("cpu")


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
    factors, energy = factorise_sites(
        chosen, 4, "svd", None, torch.bfloat16, CPU, lambda done, of: told.append((done, of)), call_dtype=torch.float32
    )
    assert len(most) == len(chosen) == 10 and max(most) == 0
    assert told == [(i, 10) for i in range(1, 11)]
    check_shapes(chosen, factors)
    expected = {f"{site.key(part)}.{letter}" for site in chosen for part in site.parts for letter in "AB"}
    assert set(factors) == expected and {f"{part}.{letter}" for part in energy for letter in "AB"} == expected
    for tensor in factors.values():  # none is a view that keeps a whole decomposition
        assert tensor.dtype is torch.bfloat16 and tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("method", low_rank.METHODS)
def test_parts_are_factorised_apart(network, sites, method):
    """Literal slices of the weights: q, k, v, mlp of outputs; each with its own channels' magnitudes."""
    chosen, random = [s for s in sites if s.index == 1], np.random.default_rng(1)
    magnitudes, seen = Magnitudes(increments=method == "cd_svd"), {}
    for site in chosen:
        values = random.exponential(size=(2, site.in_features + site.out_features)).astype(np.float32)
        for x in torch.from_numpy(values * [[0], [1]] if method == "cd_svd" else values).float():
            magnitudes.add(site, "a", x[None, None, : site.in_features], x[None, None, site.in_features :])
        mean = values[1] if method == "cd_svd" else values.mean(0)  # an increment from zero
        seen[site.name] = mean[: site.in_features].astype(float), mean[site.in_features :].astype(float)
    factors, energy = factorise_sites(chosen, 16, method, magnitudes, torch.float32, CPU)
    qkv, block = network.double_blocks[1].img_attn.qkv.weight.detach(), network.single_blocks[1]
    linear1, linear2 = block.linear1.weight.detach(), block.linear2.weight.detach()
    parts = {
        "double_blocks.1.img_attn.qkv.k": (qkv, slice(256, 512)),
        "single_blocks.1.linear1.v": (linear1, slice(512, 768)),
        "single_blocks.1.linear1.mlp": (linear1, slice(768, None)),
        "single_blocks.1.linear2.all": (linear2, slice(None)),
    }
    for name, (matrix, rows) in parts.items():
        weight = matrix[rows].numpy().astype(float)
        inputs, outputs = seen[name.rpartition(".")[0]]
        expected = reference_product(weight, 16, method, inputs, outputs[rows])
        product = (factors[f"{name}.A"].double() @ factors[f"{name}.B"].double()).numpy()
        assert np.abs(product - expected).max() < 1e-5 * np.linalg.norm(expected, 2)
        if method != "svd":
            weight = np.sqrt(outputs[rows])[:, None] * weight * np.sqrt(inputs)
        squares = np.linalg.svd(weight, compute_uv=False) ** 2
        assert energy[name] == pytest.approx(squares[:16].sum() / squares.sum(), rel=1e-4)


@pytest.mark.parametrize("size", [1e-10, 1e-4, 1e4], ids=str)
def test_factors_fit_into_half_precision_however_small_the_increments(network, sites, size):
    """One channel in four hardly moves at all; divided by its weight, B would be beyond 65504."""
    chosen, magnitudes = [s for s in sites if s.name == "double_blocks.0.img_attn.proj"], Magnitudes(increments=True)
    (site,) = chosen
    moved = size * torch.rand(1, 1, site.in_features + site.out_features, generator=torch.Generator().manual_seed(1))
    moved[..., ::4] *= 1e-9
    for x in (torch.zeros_like(moved), moved):
        magnitudes.add(site, "a", x[..., : site.in_features], x[..., site.in_features :])

    def product(dtype: torch.dtype) -> torch.Tensor:
        factors, _ = factorise_sites(chosen, 16, "cd_svd", magnitudes, dtype, CPU, call_dtype=torch.float32)
        return factors[f"{site.name}.all.A"].double() @ factors[f"{site.name}.all.B"].double()

    half, exact = product(torch.float16), product(torch.float64)
    assert (half - exact).norm() < 2e-3 * exact.norm()


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
    context, extra = encode_prompt("red apple")[0]
    context, y = context.repeat(2, 1, 1), extra["pooled_output"].repeat(2, 1)
    x = torch.randn(2, 3, 48, 64, generator=torch.Generator().manual_seed(0))
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
            torch.testing.assert_close(plain.means(site)[side], (first.abs() + second.abs()).mean((0, 1)) / 2, rtol=1e-5, atol=1e-7)
            torch.testing.assert_close(steps.means(site)[side], (second - first).abs().mean((0, 1)), rtol=1e-5, atol=1e-7)
    clamping = LinearSite("blocks", 0, "toy", linear(ClippedInput), (WHOLE,), "img", 40, 24)
    heard = Magnitudes()
    with measuring(("a",), [clamping], heard):
        clamping.module(torch.full((1, 3, 40), 100.0))
    assert heard.means(clamping)[0].tolist() == [100.0] * 40

"""Low-rank factors of the demo network's layers: one for each part, one dense layer at a time, magnitudes as measured in a call."""

from __future__ import annotations

import gc
import weakref

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core.calibration import low_rank
from comfyui_duca.cache_core.calibration.low_rank import Magnitudes, dense_weight, factorise_sites, measuring
from comfyui_duca.cache_core.engine.linear_sites import LinearSite, check_shapes
from comfyui_duca.cache_core.families.shared.fused import UNSPLIT
from comfyui_duca.nodes.demo_flux import encode_prompt
from helpers.layers import ClippedInput, linear, reference_product

CPU = torch.device("cpu")


def test_magnitudes_that_were_not_measured_are_refused(sites):
    with pytest.raises(ValueError, match="increments"):
        factorise_sites(sites[:1], 4, "cd_svd", Magnitudes(), torch.float32, CPU)
    with pytest.raises(ValueError, match="not of increments"):
        factorise_sites(sites[:1], 4, "ca_svd", Magnitudes(increments=True), torch.float32, CPU)
    with pytest.raises(ValueError, match="were measured"):
        factorise_sites(sites[:1], 4, "ca_svd", Magnitudes(), torch.float32, CPU)


def test_factorised_sites_and_one_dense_layer_at_a_time(sites, monkeypatch):
    alive, most, progress = [], [], []
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
        chosen, 4, "svd", None, torch.bfloat16, CPU, lambda done, of: progress.append((done, of)), call_dtype=torch.float32
    )
    assert len(most) == len(chosen) == 10 and max(most) == 0
    assert progress == [(i, 10) for i in range(1, 11)]
    check_shapes(chosen, factors)
    expected = {f"{site.key(part)}.{letter}" for site in chosen for part in site.parts for letter in "AB"}
    assert set(factors) == expected and {f"{part}.{letter}" for part in energy for letter in "AB"} == expected
    for tensor in factors.values():  # none is a view that keeps a whole decomposition alive
        assert tensor.dtype is torch.bfloat16 and tensor.untyped_storage().nbytes() == tensor.nbytes


@pytest.mark.parametrize("method", low_rank.METHODS)
def test_parts_are_factorised_apart(network, sites, method):
    """The reference takes slices of the weights: q, k, v and mlp of the outputs, each with the magnitudes of its own channels."""
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
    """One channel in four hardly changes at all. Divided by its weight, B would exceed 65504."""
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
    clamping = LinearSite("blocks", 0, "toy", linear(ClippedInput), (UNSPLIT,), "img", 40, 24)
    heard = Magnitudes()
    with measuring(("a",), [clamping], heard):
        clamping.module(torch.full((1, 3, 40), 100.0))
    assert heard.means(clamping)[0].tolist() == [100.0] * 40

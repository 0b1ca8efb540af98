"""Low-rank factors for increment-calibrated caching: dense weights of any layer, channel magnitudes, and the three decompositions."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from comfyui_duca.cache_core.calibration import low_rank
from comfyui_duca.cache_core.calibration.low_rank import Magnitudes, dense_weight, factorise
from comfyui_duca.cache_core.engine.linear_sites import LinearSite
from comfyui_duca.cache_core.families.shared.fused import UNSPLIT
from helpers.layers import ClippedInput, linear, reference_product
from torch import nn

CPU = torch.device("cpu")


# -- factors ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", low_rank.METHODS)
@pytest.mark.parametrize("shape", [(12, 7), (7, 12), (9, 9)], ids=str)
@pytest.mark.parametrize("rank", [1, 4, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["f32", "f64"])
def test_factors_are_those_of_the_paper(method, shape, rank, dtype):
    random = np.random.default_rng(sum(shape) + rank)
    weight, r, l = random.normal(size=shape), random.exponential(size=shape[1]), random.exponential(size=shape[0])  # noqa: E741
    if dtype is torch.float64:
        r[0] = 0.0  # is raised to the floor; float32 has a thousand times fewer digits for it
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
    """Rank 1 of diag(3, 4, 0) keeps 16 of 25."""
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
    with pytest.raises(AssertionError):  # it is another algorithm than the exact one
        torch.testing.assert_close(first.a.abs(), factorise(weight, 48).a.abs(), rtol=0, atol=0)


def test_wrong_methods_and_missing_magnitudes_are_refused():
    with pytest.raises(ValueError, match="unknown method"):
        factorise(torch.eye(3), 1, "pca")
    with pytest.raises(ValueError, match="magnitudes"):
        factorise(torch.eye(3), 1, "ca_svd")
    with pytest.raises(ValueError, match="at least 1"):
        factorise(torch.eye(3), 0)


# -- dense weights ------------------------------------------------------------------------------------------------------------


class Quantised(nn.Module):
    """Has int8 weights and a scale for each output. It has the two sizes of nn.Linear and nothing else of it."""

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
    """Adds a LoRA in its forward."""

    def forward(self, x):
        return super().forward(x) + 0.3 * (x @ self.down.T) @ self.up.T


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
    """With a bias of 100 times the weights, module(I) - module(0) would keep only 2 of 8 binary digits."""
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
    with pytest.raises(ValueError, match="are not linear"):
        dense_weight(bent, torch.float32, CPU)


def test_a_layer_of_zeros_has_a_weight_of_zeros():
    module = linear()
    module.weight.data.zero_()
    assert not dense_weight(module, torch.float32, CPU).any()


# -- magnitudes ---------------------------------------------------------------------------------------------------------------


def toy_site(inputs=2, outputs=3, layer="toy"):
    return LinearSite("blocks", 0, layer, linear(inputs=inputs, outputs=outputs), (UNSPLIT,), "img", inputs, outputs)


def test_magnitudes_by_hand():
    site, magnitudes = toy_site(), Magnitudes()
    magnitudes.add(site, "a", torch.tensor([[[1.0, -2.0], [3.0, 4.0]]]), torch.ones(1, 2, 3))
    magnitudes.add(site, "b", torch.tensor([[[-5.0, 0.0]]]), -4 * torch.ones(1, 1, 3))
    inputs, outputs = magnitudes.means(site)
    assert inputs.dtype is torch.float64
    assert inputs.tolist() == [3.0, 2.0]  # (1 + 3 + 5) / 3, (2 + 4 + 0) / 3
    assert outputs.tolist() == [2.0, 2.0, 2.0]


def test_increments_by_hand():
    """Each cond is compared with itself, never across runs or shapes. Tokens 0 and 3 of 4 are sampled."""
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

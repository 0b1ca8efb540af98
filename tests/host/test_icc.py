"""Increment-calibrated caching: which layers it uses, what it keeps, what an incremental evaluation answers, and what it costs."""

from __future__ import annotations

import pytest
import torch
from comfyui_duca.cache_core.calibration.low_rank import Magnitudes, factorise_sites, measuring
from comfyui_duca.cache_core.engine import EngineCall, FactorisedLayers, Slot, TokenSelection, incremental, listening
from comfyui_duca.cache_core.engine.incremental import keeping_layers
from comfyui_duca.cache_core.engine.linear_sites import (
    LinearSite,
    check_factors,
    icc_bytes,
    linear_sites,
)
from comfyui_duca.cache_core.families import undescribed
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.families.shared.fused import UNSPLIT, LinearPart
from comfyui_duca.cache_core.overrides import forward_overrides
from comfyui_duca.cache_core.refusals import UnsupportedCallError
from comfyui_duca.cache_core.store import FeatureStore, StoreFormat
from comfyui_duca.nodes.demo_flux import encode_prompt
from helpers.reference_flux import ReferenceFlux
from helpers.sampling import known_of, linear_sites_of
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
SIZE = (48, 64)  # 192 image tokens, as in the calls of `sites`


@pytest.fixture(scope="module")
def full_factors(sites):
    return factorise_sites(sites, 10**6, "svd", None, torch.float32, CPU)[0]


@pytest.fixture(scope="module")
def small_factors(sites):
    return factorise_sites(sites, 8, "svd", None, torch.float32, CPU)[0]


class Driver:
    """Makes the evaluations of a run over some conds, without a plan. Each cond has a slot."""

    def __init__(self, network, sites, factors, conds="ab", fmt=StoreFormat()):
        self.network, self.layers = network, FactorisedLayers(tuple(sites), factors)
        self.store = FeatureStore(fmt)
        self.slots = {cond: Slot(self.store, 1) for cond in conds}
        self.known = {number: known_of(network, SIZE, number) for number in range(1, len(conds) + 1)}

    def call(self, conds, sigma) -> EngineCall:
        return EngineCall(
            model=self.network, known=self.known[len(conds)], family=FLUX, slots=[self.slots[c] for c in conds], time=sigma,
            selection=TokenSelection(0.0, 0), layers=self.layers,
        )  # fmt: skip

    @torch.inference_mode()
    def full(self, conds, sigma, x, context, y):
        call = self.call(conds, sigma)
        with listening(call):
            return self.network(x.clone(), torch.full((x.shape[0],), sigma), context.clone(), y)

    @torch.inference_mode()
    def icc(self, conds, sigma, x, context, y):
        call = self.call(conds, sigma)
        with incremental(call, self.store):
            result = self.network(x.clone(), torch.full((x.shape[0],), sigma), context.clone(), y)
        assert call.is_touched and call.is_finished
        return result


def inputs(seed: int, size=SIZE):
    (context, extra), (context2, extra2) = encode_prompt("red apple")[0], encode_prompt("tiger face")[0]
    x = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(seed))
    return x, torch.cat((context, context2)), torch.cat((extra["pooled_output"], extra2["pooled_output"]))


def rows(values, at: slice):
    return tuple(value[at] for value in values)


def assert_near(result, expected, tolerance=2e-5):
    assert (result.double() - expected.double()).abs().max() / expected.abs().max() < tolerance


# -- where the layers are -----------------------------------------------------------------------------------------------------


def test_all_linear_layers_but_modulation_are_found(network, sites):
    assert len(sites) == 3 * 8 + 6 * 2
    double = ["attn.qkv", "attn.proj", "mlp.0", "mlp.2"]
    assert {s.layer for s in sites if s.stack == "double_blocks"} == {f"{stream}_{name}" for stream in ("img", "txt") for name in double}
    assert {s.layer for s in sites if s.stack == "single_blocks"} == {"linear1", "linear2"}
    by_name = {site.name: site for site in sites}
    fused = by_name["single_blocks.5.linear1"]
    assert [fused.key(part) for part in fused.parts] == [f"single_blocks.5.linear1.{name}" for name in ("q", "k", "v", "mlp")]
    assert [fused.outputs(part) for part in fused.parts] == [256, 256, 256, 1024]
    assert by_name["single_blocks.0.linear2"].parts == (UNSPLIT,)
    assert [by_name[f"double_blocks.0.{s}_mlp.0"].tokens for s in ("img", "txt")] == [(192,), (12,)] and fused.tokens == (204,)
    assert fused.ranks(300) == [256, 256, 256, 256]
    assert by_name["double_blocks.0.img_mlp.0"].parts == (UNSPLIT,)


def test_wrapped_layers_are_one(network):
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner, self.in_features, self.out_features = inner, inner.in_features, inner.out_features

        def forward(self, x):
            return self.inner(x)

    block = network.single_blocks[0]
    before, block.linear2 = block.linear2, Wrapper(block.linear2)
    try:
        found = [s for s in linear_sites_of(network) if s.stack == "single_blocks" and s.index == 0]
        assert [site.layer for site in found] == ["linear1", "linear2"]
        assert found[1].module is block.linear2
    finally:
        block.linear2 = before


def test_of_a_model_that_no_file_describes_every_layer_is_one_matrix(network, sites):
    found = linear_sites(undescribed(network), known_of(network, SIZE).layer_calls, network)
    assert [(site.name, site.tokens, site.parts) for site in found] == [(site.name, site.tokens, (UNSPLIT,)) for site in sites]


def test_factors_of_another_model_are_refused(network, sites, small_factors):
    """Names and sizes are checked before the run, a part's own size when its layer is bound."""
    check_factors(network, small_factors)
    key = "single_blocks.0.linear1.mlp"
    for other in (torch.zeros(1793, 8), torch.zeros(1024, 9)):  # linear1 has 1792 outputs
        with pytest.raises(ValueError, match=f"the factors of {key} do not have the model's shapes: they were made for another model"):
            check_factors(network, small_factors | {f"{key}.A": other})
    with pytest.raises(ValueError, match=f"the factors of {key} do not have"):
        check_factors(network, {name: f for name, f in small_factors.items() if name != f"{key}.A"})
    with pytest.raises(ValueError, match=r"factors for single_blocks\.6\.linear1, which this model has not"):
        check_factors(network, {"single_blocks.6.linear1.q.A": torch.zeros(256, 8), "single_blocks.6.linear1.q.B": torch.zeros(8, 256)})
    with pytest.raises(ValueError, match=f"the factors of {key} are .* made for another model"):
        FactorisedLayers.bind(sites, small_factors | {f"{key}.A": torch.zeros(1000, 8)})


def test_layers_without_factors_are_left_to_the_host(sites, small_factors):
    some = {name: factor for name, factor in small_factors.items() if ".linear2." in name or ".linear1.q" in name}
    bound = FactorisedLayers.bind(sites, some)
    assert [site.name for site in bound.sites] == [f"single_blocks.{i}.linear2" for i in range(6)]  # linear1 has other parts too
    with pytest.raises(UnsupportedCallError, match="none of the layers with low-rank factors"):
        FactorisedLayers.bind(sites, {})


# -- evaluations --------------------------------------------------------------------------------------------------------------


def test_at_full_rank_the_uncached_model_is_reproduced(network, sites, full_factors):
    """At another noise level and with another input than the anchor's, nothing is left of the approximation."""
    driver = Driver(network, sites, full_factors)
    with torch.inference_mode():
        expected = network(inputs(1)[0], torch.full((2,), 0.6), *inputs(1)[1:])
    uncached = driver.full("ab", 1.0, *inputs(0))
    assert torch.equal(uncached, driver.full("ab", 1.0, *inputs(0)))
    result = driver.icc("ab", 0.6, *inputs(1))
    assert (uncached - expected).abs().max() > 0.1 * expected.abs().max()  # the increment is not small
    assert_near(result, expected)


class ReferenceICC(ReferenceFlux):
    """The dense reference, with every linear layer of the blocks as y_c + A·B·(x - x_c) once `factors` are given."""

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
        pieces = {"qkv": "qkv", "linear1": ("q", "k", "v", "mlp")}
        parts = pieces.get(name.rsplit(".", 1)[1], ("all",))
        products = [self.factors[f"{name}.{part}.A"].double() @ self.factors[f"{name}.{part}.B"].double() for part in parts]
        return torch.cat(products)


def test_at_small_rank_every_linear_is_the_papers(network, sites, small_factors):
    """Two incremental evaluations follow one anchor. The reference is the paper's own form, which keeps x_c."""
    driver, reference = Driver(network, sites, small_factors), ReferenceICC(network)
    driver.full("ab", 1.0, *inputs(0))
    reference(inputs(0)[0], torch.ones(2), *inputs(0)[1:])
    reference.factors = small_factors
    kept = {key: feature.data.clone() for key, feature in driver.slots["a"].layers.items()}
    for seed, sigma in ((1, 0.7), (2, 0.4)):
        result = driver.icc("ab", sigma, *inputs(seed))
        assert_near(result, reference(inputs(seed)[0], torch.full((2,), sigma), *inputs(seed)[1:])[0])
        with torch.inference_mode():
            exact = network(inputs(seed)[0], torch.full((2,), sigma), *inputs(seed)[1:])
        assert (result - exact).abs().max() > 0.01 * exact.abs().max()  # rank 8 is far from exact
    assert all(torch.equal(driver.slots["a"].layers[key].data, value) for key, value in kept.items())
    assert driver.slots["a"].anchors[-1].time == 0.4  # the hidden state is this evaluation's


def test_conds_may_be_called_apart_together_and_in_any_order(network, sites, small_factors):
    together, apart = Driver(network, sites, small_factors), Driver(network, sites, small_factors)
    together.full("ab", 1.0, *inputs(0))
    for cond, at in (("a", slice(0, 1)), ("b", slice(1, 2))):
        apart.full(cond, 1.0, *rows(inputs(0), at))
    expected = together.icc("ab", 0.7, *inputs(1))
    swapped = apart.icc("ba", 0.7, *(value.flip(0) for value in inputs(1)))
    assert_near(swapped.flip(0), expected, 1e-5)
    for _ in range(2):  # nor is anything written to what is kept of a cond alone
        assert_near(apart.icc("b", 0.7, *rows(inputs(1), slice(1, 2))), expected[1:], 1e-5)


class Clamping(nn.Linear):
    """Clamps its input in place, as the host's fp8 layers do."""

    def forward(self, x):
        return super().forward(x.clamp_(-4.0, 4.0))


def test_what_is_kept_of_a_layer_that_clamps_its_input(network):
    """z is computed from the input as the host gave it."""
    site = LinearSite("blocks", 0, "toy", Clamping(40, 24), (LinearPart("p", slice(0, 10)), LinearPart("q", slice(10, 24))), (5,), 40, 24)
    factors = {"blocks.0.toy.p.A": torch.zeros(10, 1), "blocks.0.toy.p.B": torch.ones(1, 40)}
    factors |= {"blocks.0.toy.q.A": torch.zeros(14, 2), "blocks.0.toy.q.B": torch.ones(2, 40)}
    driver = Driver(network, [site], factors, "a")
    call = driver.call("a", 1.0)
    with torch.inference_mode(), forward_overrides(keeping_layers(call)):
        site.module(torch.full((1, 5, 40), 100.0))
    assert driver.slots["a"].layers[site.projection_key].data[0, 0].tolist() == [4000.0, 4000.0, 4000.0]


def test_unknown_calls_are_refused_and_nothing_is_written(network, sites, small_factors):
    driver = Driver(network, sites, small_factors)
    with pytest.raises(UnsupportedCallError, match="nothing of this shape"):
        driver.icc("ab", 0.7, *inputs(1))  # there is no anchor
    driver.full("ab", 1.0, *inputs(0))
    with pytest.raises(UnsupportedCallError, match="another shape"):
        driver.icc("ab", 0.7, *inputs(1, (32, 32)))
    site = sites[0]
    call = driver.call("ab", 0.7)
    with torch.inference_mode(), incremental(call, driver.store):
        with pytest.raises(UnsupportedCallError, match="another shape"):
            site.module(torch.zeros(192, 256))
        with pytest.raises(UnsupportedCallError, match="another shape"):
            site.module(torch.zeros(2, 1, 256))
        site.module(torch.zeros(2, 192, 256))
        with pytest.raises(UnsupportedCallError, match="more often than before"):
            site.module(torch.zeros(2, 192, 256))
    with torch.inference_mode(), forward_overrides(keeping_layers(call)):  # the host's answer, kept once
        before = driver.slots["a"].layers[site.output_key]
        assert site.module(torch.zeros(192, 256)).shape == (192, 768)
        assert driver.slots["a"].layers[site.output_key] is before


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
    """There are 10 tokens in two calls, 6 inputs, and 9 outputs in two row parts of 3 and 6. Rank 4 is cut to 3 in the first part."""
    parts = (LinearPart("a", rows=slice(0, 3)), LinearPart("b", rows=slice(3, None)))
    site = LinearSite("blocks", 0, "toy", nn.Identity(), parts, (4, 6), 6, 9)
    assert site.ranks(4) == [3, 4]
    assert icc_bytes([site], 4, torch.bfloat16) == 10 * (9 + 7) * 2
    assert icc_bytes([site], 4, torch.bfloat16, StoreFormat(dtype=torch.float8_e4m3fn)) == 10 * (9 + 4 + 7 + 4)


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float8_e4m3fn], ids=["model", "bf16", "fp8"])
def test_bytes_are_those_kept(network, sites, small_factors, dtype):
    driver = Driver(network, sites, small_factors, fmt=StoreFormat(dtype=dtype))
    driver.full("ab", 1.0, *inputs(0))
    driver.full("ab", 0.9, *inputs(1))  # memory is used again
    kept = driver.store.bytes - 2 * 192 * driver.store.format.bytes_per_token(256, torch.float32)  # without the hidden states
    for ranks in (8, small_factors):
        assert kept == 2 * icc_bytes(sites, ranks, torch.float32, driver.store.format)
    driver.icc("ab", 0.8, *inputs(2))
    assert driver.store.bytes == driver.store.peak_bytes


def test_macs_are_those_torch_counts(network, sites, small_factors):
    """Embedding, modulation and attention cost what they do in a full evaluation. Only the blocks' linear layers are cheaper: per token,
    rank times inputs and outputs instead of inputs times outputs (arXiv 2505.05829), and rank times inputs more where y_c and z_c are kept.
    """
    driver = Driver(network, sites, small_factors)

    def counted(evaluate, *arguments):
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            evaluate(*arguments)
        return counter.get_total_flops() / 2 / 2  # flops to multiply-adds, two rows

    x, *others = inputs(0)
    full = counted(torch.inference_mode()(network), x, torch.ones(2), *others)
    ranks = [(site, part, rank) for site in sites for part, rank in zip(site.parts, site.ranks(8))]
    parts = [(sum(site.tokens), rank, site.in_features, site.outputs(part)) for site, part, rank in ranks]
    anchor = full + sum(tokens * rank * inputs for tokens, rank, inputs, _ in parts)
    assert counted(driver.full, "ab", 1.0, *inputs(0)) == pytest.approx(anchor, rel=1e-3)
    expected = full + sum(tokens * (rank * (ins + outs) - ins * outs) for tokens, rank, ins, outs in parts)
    assert counted(driver.icc, "ab", 0.7, *inputs(1)) == pytest.approx(expected, rel=1e-3)

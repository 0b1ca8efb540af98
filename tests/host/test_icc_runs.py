"""Runs with incremental evaluations through the host's own sampling: pictures, kinds, costs, and what is freed."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import node_helpers
import pytest
import torch
from comfyui_duca.cache_core import Plan, StoreFormat
from comfyui_duca.cache_core.calibration.low_rank import factorise_sites
from comfyui_duca.cache_core.engine import FactorisedLayers
from comfyui_duca.cache_core.planning.policies import Given, IccCycle
from comfyui_duca.cache_core.predictors import Chebyshev, Predictor, Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.host import cached_model
from comfyui_duca.nodes.pictures.report_plot import report_plot
from comfyui_duca.nodes.pictures.report_text import report_text
from helpers.predictors import Innovating
from helpers.sampling import kinds, last_report, linear_sites_of, psnr, sample, split_calls
from torch.utils.flop_counter import FlopCounterMode

CPU = torch.device("cpu")
RANK = 32


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


def factors_of(model, rank):
    return factorise_sites(linear_sites_of(model.model.diffusion_model), rank, "svd", None, torch.float32, CPU, exact=True)[0]


@pytest.fixture(scope="module")
def factors(model):
    return factors_of(model, RANK)


def planned(model, plan: str, factors, predictor: Predictor = Reuse(), **strategy):
    """Returns the model with a cache that follows this plan."""
    chosen = Strategy(Given(Plan.parse(plan)), predictor, factors=factors, **strategy)
    return host.attach(model, chosen, host.HostOptions(choose_device=False))


@pytest.fixture
def runs(monkeypatch):
    """Returns a list of every CacheRun that the host opens."""
    opened, original = [], cached_model._Runs.open
    monkeypatch.setattr(cached_model._Runs, "open", lambda *args: opened.append(original(*args)) or opened[-1])
    return opened


# -- pictures -----------------------------------------------------------------------------------------------------------------


def test_at_full_rank_the_uncached_picture_is_reproduced(model):
    """The difference is float32 rounding over 12 evaluations: 1.5e-5 at most was seen, for values in about -1..1."""
    patched = planned(model, "FFiiiiiiiiii", factors_of(model, 10**6))
    for prompt in ("red apple", "tiger face"):
        assert torch.allclose(sample(patched, prompt=prompt), sample(model, prompt=prompt), rtol=0, atol=1e-4)
        assert kinds(last_report(patched)) == "FFiiiiiiiiii"


@pytest.mark.parametrize(("plan", "gain"), [("FFiiFiiFiiFi", 2.0), ("FiFiFiFiFiFi", 2.0), ("FFiiiiiiiiii", 1.0)])
def test_rank_32_is_nearer_than_reuse(model, factors, plan, gain):
    """The mean over three prompts is compared with keeping every sublayer (share 0), and the whole stack, in the same places.

    Seen for the three plans: incremental 29.0, 34.5, 18.4 dB; sublayers 25.8, 30.2, 16.6 dB; stack 25.7, 29.4, 16.6 dB.
    """
    prompts = ("red apple", "castle", "tiger face")
    uncached = [sample(model, prompt=prompt) for prompt in prompts]

    def quality(text):
        patched = planned(model, text, factors, token_share=0.0)
        return sum(psnr(sample(patched, prompt=prompt), expected) for prompt, expected in zip(prompts, uncached)) / 3

    assert quality(plan) > max(quality(plan.replace("i", other)) for other in "ca") + gain


def computing_in_bfloat16():
    """Returns a model that computes, and keeps weights, features and placed factors, in bfloat16."""
    model = load_demo_model(torch.bfloat16)
    model.model.manual_cast_dtype = torch.bfloat16
    return model


@pytest.mark.parametrize("load", [lambda: load_demo_model(torch.bfloat16), computing_in_bfloat16], ids=["weights", "all"])
def test_bfloat16(load, factors, runs):
    model = load()
    compute = model.model.manual_cast_dtype
    patched = planned(model, "FFiiFiiFiiFi", factors)
    result, expected = sample(patched), sample(model)
    assert psnr(result, expected) > psnr(sample(planned(model, "FFaaFaaFaaFa", factors)), expected) + 1
    report = runs[0].report
    assert kinds(report) == report.plan and not report.notices
    assert report.peak_bytes == report.predicted_bytes == 2 * bytes_per_row(156, 144, compute.itemsize)


# -- kinds --------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sampling", [{}, {"cfg": 1.0}, {"batch": 2, "size": (32, 40)}], ids=["plain", "cfg 1", "batch"])
@pytest.mark.parametrize("plan", ["FiiFiiFi", "FaiaFiaa", "FcciFica", "FiaaFFFF"])
def test_a_run_follows_its_plan(model, factors, plan, sampling):
    patched = planned(model, plan, factors, Chebyshev(), token_share=0.2)
    result = sample(patched, steps=8, **sampling)
    report = last_report(patched)
    assert kinds(report) == plan and not report.notices
    assert report.predicted_bytes == report.peak_bytes == report.evaluations[-1].cache_bytes
    assert psnr(result, sample(model, steps=8, **sampling)) > 17
    assert f"{plan.count('i')} incremental" in report_text(report)


def test_the_policy_of_the_method(model, factors):
    patched = host.attach(model, Strategy(IccCycle(3), factors=factors))
    sample(patched, steps=8)
    assert kinds(last_report(patched)) == "FiiFiiFi"
    assert report_plot(last_report(patched)).shape[-1] == 3


def test_a_skip_uses_the_hidden_state_of_an_incremental_evaluation(model, factors, runs):
    patched, times = planned(model, "FiaF", factors, Chebyshev()), []
    sample(patched, steps=4, cfg=1.0, callback=lambda *_: times.append([a.time for s in runs[0]._slots._slots.values() for a in s.anchors]))
    assert [len(t) for t in times] == [1, 2, 2, 3]


def test_both_conds_in_one_call_or_in_two_give_the_same(model, factors, monkeypatch):
    patched = planned(model, "FiiaFii", factors)
    together = sample(patched, steps=7)
    split_calls(monkeypatch)
    apart = sample(patched, steps=7)
    assert [e.calls for e in last_report(patched).evaluations] == [2] * 7 and kinds(last_report(patched)) == "FiiaFii"
    assert torch.allclose(together, apart, atol=1e-4)


def longer(text: str, tokens: int = 20):
    """Returns a prompt whose context has more tokens than the demo's 12."""
    context, extra = encode_prompt(text)[0]
    return [[context.repeat(1, 2, 1)[:, :tokens], extra]]


def test_conds_of_unequal_length(model, factors):
    patched = planned(model, "FiiFii", factors)
    sample(patched, steps=6, negative=longer("castle"))
    report = last_report(patched)
    assert kinds(report) == "FiiFii" and [e.calls for e in report.evaluations] == [2] * 6
    assert report.predicted_bytes == report.peak_bytes == bytes_per_row(156, 144) + bytes_per_row(164, 144)


def late_prompt(model, plan, factors):
    """Returns the report of a run in which another prompt, of another length, starts at a later evaluation."""
    early = node_helpers.conditioning_set_values(encode_prompt("red apple"), {"end_percent": 0.35})
    late = node_helpers.conditioning_set_values(longer("red apple"), {"start_percent": 0.35})
    patched = planned(model, plan, factors)
    sample(patched, positive=early + late, steps=8, cfg=1.0)
    return last_report(patched)


def test_a_cond_that_appears_late_is_computed_first(model, factors):
    """Nothing is kept of it, so it is computed whatever the plan says. Then it keeps only what later steps can use."""
    report = late_prompt(model, "FiiiiiFF", factors)
    changed = kinds(report).index("F", 1)
    assert kinds(report) == "F" + "i" * (changed - 1) + "F" + "i" * (5 - changed) + "FF" and 1 < changed < 5
    assert report.predicted_bytes == report.peak_bytes == bytes_per_row(156, 144) + bytes_per_row(164, 144)
    report = late_prompt(model, "FiFFFFFF", factors)
    assert kinds(report) == "FiFFFFFF"
    assert report.predicted_bytes == report.peak_bytes == bytes_per_row(156, 144) + 4 * 144 * 256


def used_once_more(block):
    """Returns a forward, as of a block patch, that uses a layer once more for tokens of its own."""
    original = block.forward

    def twice(*args, **kwargs):
        block.img_mlp(torch.zeros(2, 3, 256))
        return original(*args, **kwargs)

    return twice


def test_a_layer_called_in_another_way_than_before_is_computed_in_full_and_said_once(model, factors, monkeypatch):
    patched = planned(model, "FiiFi", factors)
    sample(patched, steps=5)
    assert kinds(last_report(patched)) == "FiiFi"
    block = model.model.diffusion_model.double_blocks[1]
    monkeypatch.setattr(block, "forward", used_once_more(block))
    result = sample(patched, steps=5)
    report = last_report(patched)
    assert kinds(report) == "FFFFF" and len([n for n in report.notices if "another shape" in n]) == 1
    assert torch.equal(result, sample(model, steps=5))


def test_a_layer_that_is_called_twice_from_the_start_is_incremental_both_times(factors, monkeypatch):
    model = load_demo_model()
    patched, block = planned(model, "FiiFi", factors_of(model, 10**6)), model.model.diffusion_model.double_blocks[1]
    monkeypatch.setattr(block, "forward", used_once_more(block))
    assert torch.allclose(sample(patched, steps=5), sample(model, steps=5), rtol=0, atol=1e-4)
    assert kinds(last_report(patched)) == "FiiFi" and not last_report(patched).notices


def test_layers_replaced_after_binding_are_found(model, factors):
    """Object patches replace modules when the model is loaded, which may be after the strategy was made."""
    patched = planned(model, "FiiFii", factors)
    expected = sample(patched, steps=6)
    network = model.model.diffusion_model
    before = network.single_blocks[0].linear2
    changed = torch.nn.Linear(before.in_features, before.out_features)
    changed.load_state_dict(before.state_dict())
    network.single_blocks[0].linear2 = changed
    try:
        assert torch.allclose(sample(patched, steps=6), expected, atol=1e-5)
    finally:
        network.single_blocks[0].linear2 = before


# -- costs --------------------------------------------------------------------------------------------------------------------


def bytes_per_row(joint: int, image: int, itemsize: int = 4, anchors: int = 1) -> int:
    """Returns the demo model's bytes (width 256) at rank 32: outputs and projections of 3 double and 6 single blocks, and hidden states."""
    double = (3 + 1 + 4 + 1) * 256 + 6 * RANK  # qkv, proj, mlp.0, mlp.2; z of q, k, v and the other three
    single = (3 + 4 + 1) * 256 + 5 * RANK  # q, k, v and mlp of linear1, linear2; z of its five parts
    return itemsize * (joint * (3 * double + 6 * single) + anchors * image * 256)


def whole_and_outside(network, rows: int) -> tuple[float, float]:
    """Returns multiply-adds of an evaluation with 12 text and 144 image tokens, and those outside its blocks, as torch counts them."""
    context, extra = encode_prompt("red apple")[0]
    given = torch.randn(rows, 3, 48, 48), torch.ones(rows), context.repeat(rows, 1, 1), extra["pooled_output"].repeat(rows, 1)
    plain_attention = torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    with torch.inference_mode(), plain_attention, FlopCounterMode(display=False) as counter:
        network(*given)
    flops = {name: sum(counts.values()) for name, counts in counter.get_flop_counts().items()}
    blocks = [count for name, count in flops.items() if name.split(".")[-2:-1] in (["double_blocks"], ["single_blocks"])]
    assert len(blocks) == 9
    return flops["Global"] / 2, (flops["Global"] - sum(blocks)) / 2


def test_macs_are_those_added_up_by_hand(model, factors):
    """There are 156 tokens and 9 blocks of 12·256² weights. Every part of rank 32 costs its inputs plus outputs, z_c its inputs alone."""
    patched = planned(model, "FiaFiaFF", factors)
    sample(patched, steps=8)
    rows = 2
    full, outside = whole_and_outside(model.model.diffusion_model, rows)
    dense = rows * 156 * 9 * 12 * 256**2
    increments = rows * 156 * RANK * (3 * (3 * 512 + 512 + 2 * 1280) + 6 * (3 * 512 + 1280 + 1536))  # double blocks, then single ones
    projections = rows * 156 * 9 * RANK * (3 * 256 + 256 + 256 + 1024)
    cost = {"F": full + projections, "i": full - dense + increments, "a": outside}
    report = last_report(patched)
    expected = [cost[letter] for letter in "FiaFia"] + [full, full]  # no incremental evaluation follows the last two
    assert [e.macs for e in report.evaluations] == pytest.approx(expected, rel=1e-9)
    assert [e.full_macs for e in report.evaluations] == pytest.approx([full] * 8, rel=1e-9)
    assert report.compute_speedup == pytest.approx(8 * full / sum(expected))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float8_e4m3fn], ids=["model", "bf16", "fp8"])
@pytest.mark.parametrize("plan", ["FiiFiF", "FcicFF", "FiaiaF"])
def test_predicted_bytes_are_allocated(model, factors, plan, dtype):
    patched = planned(model, plan, factors, Chebyshev(), storage=StoreFormat(dtype=dtype))
    sample(patched, steps=6)
    report = last_report(patched)
    assert kinds(report) == plan and report.predicted_bytes == report.peak_bytes > 2 * bytes_per_row(156, 0, 1)


def test_a_forecast_that_uses_the_input_finds_it_beside_incremental_hidden_states(model, factors):
    patched = planned(model, "FiaFia", factors, Innovating(torch.zeros(48, 256), history=4))
    sample(patched, steps=6)
    report = last_report(patched)
    assert kinds(report) == "FiaFia"
    assert report.predicted_bytes == report.peak_bytes == 2 * (bytes_per_row(156, 144, anchors=4) + 4 * 4 * 144 * 48)


def test_only_what_can_still_be_used_is_kept(model, factors, runs):
    """Full evaluations after which no conservative or incremental one comes keep only the hidden state. The rest stays the first one's."""
    kept = []

    def callback(*_):
        (slot,) = runs[0]._slots._slots.values()
        kept.append([feature.data.sum().item() for feature in (*slot.layers.values(), *slot.sublayers.values())])

    sample(planned(model, "FciFFF", factors, token_share=0.0), steps=6, cfg=1.0, callback=callback)
    assert all(values == kept[0] for values in kept) and len(kept) == 6


# -- what is left behind ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["finished", "cancelled", "failed"])
def test_everything_is_freed_and_restored(factors, runs, how):
    """That is features, placed factors and every forward. In bfloat16, so that placed factors differ from the given ones."""
    model = computing_in_bfloat16()
    network = model.model.diffusion_model
    forwards = [module.__dict__.get("forward") for module in network.modules()]
    patched, placed = planned(model, "FiiFii", factors), []

    def callback(step, *_):
        if step == 2:
            placed.extend(weakref.ref(tensor) for bound in runs[0]._layers._bound.values() for tensor in bound.factors.values())
        if how == "cancelled" and step == 4:
            raise comfy.model_management.InterruptProcessingException
        if how == "failed" and step == 4:
            network.single_blocks[2].mlp_act.register_forward_hook(fail)

    def fail(*_):
        raise ArithmeticError

    if how == "finished":
        sample(patched, steps=6, callback=callback)
    else:
        with pytest.raises(ArithmeticError if how == "failed" else comfy.model_management.InterruptProcessingException):
            sample(patched, steps=6, callback=callback)
    gc.collect()
    assert placed and not [reference for reference in placed if reference() is not None]
    assert runs[0].report.peak_bytes > 0 and runs[0].store.bytes == 0 and not runs[0]._slots._slots and not runs[0]._layers._bound
    assert [module.__dict__.get("forward") for module in network.modules()] == forwards
    assert last_report(patched).is_complete is (how == "finished")


def test_factors_are_put_in_place_once(factors, runs, monkeypatch):
    model, calls = computing_in_bfloat16(), []
    patched, original = planned(model, "FiiFii", factors), FactorisedLayers.placed

    def counted(self, *place):
        result = original(self, *place)
        calls.append(result is not self)
        return result

    monkeypatch.setattr(FactorisedLayers, "placed", counted)
    sample(patched, steps=6)
    assert calls == [True] + [False] * 5
    assert all(tensor.dtype is torch.float32 for tensor in factors.values())


def test_no_room_for_the_factors_is_survived(model, factors, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(FactorisedLayers, "placed", full)
    patched = planned(model, "FiiFii", factors)
    result, report = sample(patched, steps=6), last_report(patched)
    assert kinds(report) == "FFFFFF" and any("no memory" in notice for notice in report.notices)
    assert torch.equal(result, sample(model, steps=6))


# -- what cannot be -----------------------------------------------------------------------------------------------------------


def test_a_plan_without_factors_stops_before_sampling(model):
    calls = []
    patched = host.attach(model, Strategy(IccCycle(2), name="bare"))
    with pytest.raises(ValueError, match="'bare' has no calibration factors: calibrate this model"):
        sample(patched, steps=4, callback=lambda *_: calls.append(1))
    assert not calls


def test_factors_of_none_of_the_layers_are_of_no_use(model, factors):
    patched = planned(model, "FiiFi", {name: factor for name, factor in factors.items() if "linear1.q" in name})
    result, report = sample(patched, steps=5), last_report(patched)
    assert kinds(report) == "FFFFF" and any(
        "none of the layers with low-rank factors receives tokens" in notice for notice in report.notices
    )
    assert torch.equal(result, sample(model, steps=5))


@pytest.mark.parametrize("whole", [False, True], ids=["blocks", "whole"])
def test_compiled_models_have_incremental_evaluations_and_compile_nothing_more(model, factors, whole):
    """Overrides inside compiled blocks would be traced again in every call."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper

    expected = sample(planned(model, "FFiaFiia", factors), steps=8)
    blocks = [f"diffusion_model.double_blocks.{i}" for i in range(3)] + [f"diffusion_model.single_blocks.{i}" for i in range(6)]
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=["diffusion_model"] if whole else blocks)
    compiled = planned(compiled, "FFiaFiia", factors)
    assert torch.allclose(sample(compiled, steps=8), expected, atol=1e-4)
    assert kinds(last_report(compiled)) == "FFiaFiia" and not last_report(compiled).notices
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3  # of skipped evaluations
    torch._dynamo.reset()

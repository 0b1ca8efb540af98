"""Bytes, multiply-adds and reports: predictions against what is allocated, counted and measured (behaviours 18, 24)."""

from __future__ import annotations

import statistics
import types

import comfy.model_management
import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, Opening, StoreFormat, Timeline
from comfyui_duca.cache_core.engine import TokenChoice
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.policies import DucaCycle, GrowingGaps
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Settings, Strategy, predicted_bytes
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.report_plot import report_plot
from comfyui_duca.nodes.report_text import report_data, report_text
from host import cached, flux_1, last_report, sample, split_calls
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


FLUX_1024 = {"img": 4096, "txt": 512}


def opening(network, steps: int) -> Opening:
    return Opening(network, FLUX, Timeline([1 - i / steps for i in range(steps + 1)]), range(steps), torch.device("cpu"))


def test_flux_at_1024_by_hand():
    """Per cond, bf16: one image hidden is 4096·3072·2 = 24 MiB; all sublayers of 19 + 38 blocks are 3 GiB."""
    network, mib = flux_1(19, 38), 2**20
    auto = Settings(speedup=3.5).strategy(opening(network, 28))
    plan = auto.policy.plan(28, range(28))
    hidden = predicted_bytes(auto, plan, FLUX, network, FLUX_1024, 1, torch.bfloat16)
    assert hidden == auto.predictor.history * 24 * mib
    assert hidden <= 0.25 * 2**30
    paper = Settings(mode="paper", cycle_length=5).strategy(opening(network, 28))
    sublayers = predicted_bytes(paper, paper.policy.plan(28, range(28)), FLUX, network, FLUX_1024, 1, torch.bfloat16)
    joint = 4608 * 3072 * 2
    assert sublayers == 19 * 2 * joint + 38 * 2 * joint + 24 * mib
    assert sublayers / 2**30 == pytest.approx(3.03, abs=0.01)


def test_flux_evaluation_costs_what_papers_count():
    """50 evaluations of FLUX.1-dev at 1024² are published as 3719.5 TFLOPs, two to a multiply-add."""
    network = flux_1(19, 38)
    full, conservative = (
        FLUX.macs(network, FLUX_1024, kind, 0.1) + FLUX.outside_macs(network, FLUX_1024) for kind in (Kind.FULL, Kind.CONSERVATIVE)
    )
    assert 2 * full / 1e12 == pytest.approx(3719.5 / 50, rel=0.001)
    assert conservative / full == pytest.approx(0.071, abs=0.001)


def test_flux_at_1024_allocates_what_is_predicted():
    """The final-hidden mode with real widths and token counts: the store's memory after more full evaluations than it keeps."""
    from comfyui_duca.cache_core.engine import Slot
    from comfyui_duca.cache_core.store import FeatureStore

    network = flux_1(1, 1)
    strategy = Settings(speedup=3.5).strategy(opening(network, 28))
    store = FeatureStore(strategy.storage)
    slot = Slot(store, strategy.predictor.history)
    for i in range(8):
        slot.remember_hidden(1 - i / 8, torch.zeros(1, 4096, 3072, dtype=torch.bfloat16))
    plan = strategy.policy.plan(28, range(28))
    predicted = predicted_bytes(strategy, plan, FLUX, network, FLUX_1024, 1, torch.bfloat16)
    assert store.bytes == store.peak_bytes == predicted <= 0.25 * 2**30


@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float8_e4m3fn], ids=["model", "bf16", "fp8"])
@pytest.mark.parametrize("mode", [{"speedup": 2.5}, {"mode": "paper", "cycle_length": 4}, {"speedup": 12.0}], ids=str)
@pytest.mark.parametrize("split", [False, True], ids=["together", "split"])
def test_predicted_bytes_are_allocated_and_then_freed(model, mode, dtype, split, monkeypatch):
    if split:
        split_calls(monkeypatch)
    patched = host.attach(model, Settings(**mode, storage=StoreFormat(None, dtype)), host.HostOptions(choose_device=False))
    sample(patched, batch=2, size=(32, 32))
    report = last_report(patched)
    assert report.peak_bytes > 0
    assert abs(report.predicted_bytes - report.peak_bytes) <= 0.05 * report.peak_bytes
    assert report.evaluations[-1].cache_bytes == report.peak_bytes


def test_features_go_to_system_memory_where_the_device_is_short(model):
    """The choice is made once, with the bytes of both conds in view."""
    asked = []

    def choose(needed):
        asked.append(needed)
        return torch.device("cpu")

    run = CacheRun(Strategy(GrowingGaps(2.0)), Timeline([1.0, 0.5, 0.0]), range(2), FLUX, torch.device("cpu"), choose_device=choose)
    (context, extra), network = encode_prompt("pizza")[0], model.model.diffusion_model
    with torch.inference_mode(), run.evaluation(1.0):
        for cond in "ab":
            x = torch.randn(1, 3, 48, 48)
            run.model_call(ModelCall(network, (cond,), 0), lambda x=x: network(x, torch.ones(1), context, extra["pooled_output"]))
    assert asked == [2 * 144 * 256 * 4]
    assert run.store.format.device == torch.device("cpu")


def test_no_room_for_the_cache_is_survived(model, monkeypatch):
    """Out of memory while keeping a feature: the run goes on in full, says so, and gives the uncached image."""
    from comfyui_duca.cache_core.store import FeatureStore

    patched, puts = cached(model, mode="paper", cycle_length=4), []

    def failing(self, tensor, device):
        puts.append(1)
        if len(puts) > 30:
            raise torch.OutOfMemoryError("full")
        return torch.empty_like(tensor)

    monkeypatch.setattr(FeatureStore, "_allocate", failing)
    result = sample(patched, steps=6)
    report = last_report(patched)
    assert torch.equal(result, sample(model, steps=6))
    assert report.count(Kind.FULL) == 6
    assert any("no memory" in notice for notice in report.notices)


def flops_of(work) -> int:
    """Multiply-adds as torch counts them, an independent count of what really ran."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("kind", "share"), [("F", 0.0), ("c", 0.0), ("c", 0.25), ("c", 1.0), ("a", 0.0)])
def test_counted_macs_are_those_torch_sees(model, kind, share):
    """One evaluation of each kind, embedding and head included, with attention through the plain math kernel."""
    network = model.model.diffusion_model
    strategy = Strategy(DucaCycle(9, "a" if kind == "a" else "c", warmup=1), Reuse(), share)
    run = CacheRun(strategy, Timeline([1.0, 0.5, 0.0]), range(2), FLUX, torch.device("cpu"))
    (context, extra), x = encode_prompt("pizza")[0], torch.randn(2, 3, 48, 48)
    context, pooled = context.repeat(2, 1, 1), extra["pooled_output"].repeat(2, 1)

    def evaluate(sigma):
        with run.evaluation(sigma):
            run.model_call(ModelCall(network, ("a", "b"), 0), lambda: network(x.clone(), torch.full((2,), sigma), context, pooled))

    with torch.inference_mode(), torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        first = flops_of(lambda: evaluate(1.0))
        counted = first if kind == "F" else flops_of(lambda: evaluate(0.5))
    evaluation = run.report.evaluations[0 if kind == "F" else 1]
    assert evaluation.kind is Kind(kind)
    assert evaluation.full_macs == pytest.approx(first, rel=1e-3)
    rounding = 0.02 if share not in (0.0, 1.0) else 1e-3  # whole tokens
    assert evaluation.macs == pytest.approx(counted, rel=rounding)


def test_the_report_counts_evaluations_and_measures_time(model):
    """Heun: 23 evaluations for 12 steps; times add up to no more than the run took; the words say it."""
    import time

    patched = cached(model, speedup=3.0)
    begin = time.perf_counter()
    sample(patched, sampler="heun")
    wall_ms = (time.perf_counter() - begin) * 1000
    report = last_report(patched)
    assert len(report.evaluations) == 23
    assert 0.3 * wall_ms < report.total_ms <= wall_ms
    full = statistics.median(e.ms for e in report.evaluations if e.kind is Kind.FULL)
    assert report.time_speedup == pytest.approx(full * 23 / report.total_ms)
    text = report_text(report)
    assert f"23: {report.count(Kind.FULL)} full, 0 calibrated, 0 conservative, {report.count(Kind.AGGRESSIVE)} aggressive" in text
    assert f"{report.compute_speedup:.2f}x less" in text
    assert len(report_data(report)["evaluations"]) == 23
    assert report_text(report, verbose=True).count("\n") == text.count("\n") + 23


def test_the_plot_shows_something(model):
    patched = cached(model, mode="paper", cycle_length=5)
    sample(patched)
    plot = report_plot(last_report(patched))
    assert plot.ndim == 4 and plot.shape[-1] == 3 and 0 <= plot.min() < plot.max() <= 1


def test_token_choice_is_the_same_for_every_cond_and_differs_between_evaluations():
    a, b = TokenChoice(0.2, 3), TokenChoice(0.2, 3)
    for choice in (a, b):
        choice.begin(4)
    first = a.tokens("img", 1, 3, 100, torch.device("cpu"))
    assert torch.equal(first, b.tokens("img", 1, 3, 100, torch.device("cpu")))
    assert len(set(first.tolist())) == 20
    assert not torch.equal(first, a.tokens("img", 2, 3, 100, torch.device("cpu")))  # other blocks choose others
    a.begin(5)
    assert not torch.equal(first, a.tokens("img", 1, 3, 100, torch.device("cpu")))


def test_free_memory_is_the_patchers_where_it_knows(monkeypatch):
    """Dynamic patchers count weights that they would give back; others leave it to the host."""
    asked = types.SimpleNamespace(get_free_memory=lambda device: 7)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 3)
    assert host.free_memory(asked, torch.device("cpu")) == 7
    assert host.free_memory(types.SimpleNamespace(), torch.device("cpu")) == 3

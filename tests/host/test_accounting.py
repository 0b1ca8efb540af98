"""Predicted bytes, counted multiply-adds and reports agree with what is allocated, counted by torch and measured."""

from __future__ import annotations

import statistics
import types
from contextlib import AbstractContextManager

import comfy.model_management
import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, Places, Plan, RunStart, StoreFormat, Timeline
from comfyui_duca.cache_core.costs import expected_costs, slot_bytes
from comfyui_duca.cache_core.discovery.place import Kept, Passed, Place, Position
from comfyui_duca.cache_core.discovery.places import CallShape, Known
from comfyui_duca.cache_core.discovery.trees import Given as At
from comfyui_duca.cache_core.engine import EngineCall, Slot, TokenSelection, conservative, listening, skipping
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.planning.policies import DucaCycle, FrontLoaded, Given
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.store import FeatureStore
from comfyui_duca.cache_core.strategy import FixedSettings, Settings, Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.pictures.report_plot import report_plot
from comfyui_duca.nodes.pictures.report_text import report_data, report_text
from helpers.factors import exact_factors
from helpers.sampling import cached, flux_1, kinds, last_report, linear_sites_of, sample, split_calls
from torch.utils.flop_counter import FlopCounterMode


@pytest.fixture(scope="module")
def model():
    return load_demo_model()


class Flux1024:
    """FLUX.1 at 1024x1024 with 512 text tokens, as shapes only: the arithmetic of engine and host runs, but computes no numbers."""

    LENGTH, TEXT, WIDTH = 4608, 512, 3072

    def __init__(self) -> None:
        self.network = flux_1(19, 38)
        double, single = (At((1, "img")), At((1, "txt"))), At((0, 0))
        passed = Passed("double_blocks", (double,) * 19, last=18), Passed("single_blocks", (single,) * 38, last=37)
        shape = torch.Size((1, self.LENGTH, self.WIDTH))
        kept = Kept((), (0, 0), shape, torch.bfloat16, tokens=slice(self.TEXT, self.LENGTH))
        self.place = Place(passed, Position("double_blocks", 0), (kept,))
        self.store = FeatureStore(StoreFormat())
        self.slot = Slot(self.store, 1)

    def call(self, **more) -> EngineCall:
        return EngineCall(self.network, self.shape.known, FLUX, [self.slot], 1.0, TokenSelection(0.1, 0), **more)

    @torch.inference_mode()
    def macs(self, engine: AbstractContextManager) -> float:
        """Returns the multiply-adds of an evaluation inside this context."""
        shapes = (1, 16, 128, 128), (1,), (1, self.TEXT, 4096), (1, 768), (1,)
        with engine, FlopCounterMode(display=False) as counter:
            self.network(*(torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes))
        return counter.get_total_flops() / 2

    @property
    def shape(self) -> CallShape:
        """Returns what a run would know of the model, written down by hand."""
        image, text, joint = ((tokens, self.WIDTH) for tokens in (self.LENGTH - self.TEXT, self.TEXT, self.LENGTH))
        return CallShape(Known(self.place, "", 1, 1, 0.0, sublayers=(image, text) * (2 * 19) + (joint,) * (2 * 38)), 1)


def strategy_of(settings: Settings, steps: int) -> tuple[Strategy, Plan]:
    timeline = Timeline([1 - i / steps for i in range(steps + 1)])
    strategy = settings.strategy(RunStart(torch.nn.Module(), FLUX, timeline, range(steps)))
    return strategy, strategy.policy.plan(steps, range(steps))


def test_flux_at_1024_by_hand():
    """Per cond in bf16, one image hidden state is 4096·3072·2 bytes = 24 MiB, and all sublayers of 19 + 38 blocks are 3 GiB."""
    flux, mib = Flux1024(), 2**20
    auto, plan = strategy_of(Settings(speedup=3.5), 28)
    hidden = slot_bytes(auto, plan, flux.shape)
    assert hidden == auto.predictor.history * 24 * mib
    assert hidden <= 0.25 * 2**30
    sublayers = slot_bytes(*strategy_of(Settings(mode="paper", cycle_length=5), 28), flux.shape)
    joint = 4608 * 3072 * 2
    assert sublayers == 19 * 2 * joint + 38 * 2 * joint + 24 * mib
    assert sublayers / 2**30 == pytest.approx(3.03, abs=0.01)


def test_flux_at_1024_costs_and_keeps_what_papers_count():
    """50 evaluations of FLUX.1-dev at 1024² are published as 3719.5 TFLOPs, with two operations for a multiply-add."""
    flux = Flux1024()
    full = flux.macs(listening(flux.call(keeps_sublayers=True)))
    assert 2 * full / 1e12 == pytest.approx(3719.5 / 50, rel=0.001)
    assert flux.store.bytes == slot_bytes(*strategy_of(Settings(mode="paper", cycle_length=5), 28), flux.shape)
    assert flux.macs(conservative(flux.call(), flux.store)) / full == pytest.approx(0.071, abs=0.001)
    assert flux.macs(skipping(flux.call(), Reuse(), flux.store)) / full == pytest.approx(0.0002, abs=0.00005)


def test_flux_at_1024_allocates_what_is_predicted():
    """With only the hidden state kept, the store's memory is compared after more full evaluations than it keeps, at real widths."""
    strategy, plan = strategy_of(Settings(speedup=3.5), 28)
    store = FeatureStore(strategy.storage)
    slot = Slot(store, strategy.predictor.history)
    for i in range(8):
        slot.remember_hidden(1 - i / 8, [torch.zeros(1, 4096, 3072, dtype=torch.bfloat16)])
    assert store.bytes == store.peak_bytes == slot_bytes(strategy, plan, Flux1024().shape) <= 0.25 * 2**30


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
    assert report.predicted_bytes == report.peak_bytes
    assert report.evaluations[-1].cache_bytes == report.peak_bytes


def test_features_go_to_system_memory_where_the_device_is_short(model):
    """Where features go is decided once, from the bytes of both conds."""
    asked = []

    def choose(needed):
        asked.append(needed)
        return torch.device("cpu")

    run = CacheRun(
        Strategy(FrontLoaded(2.0)),
        RunStart(torch.nn.Module(), FLUX, Timeline([1.0, 0.5, 0.0]), range(2)),
        choose_device=choose,
    )
    (context, extra), network = encode_prompt("pizza")[0], model.model.diffusion_model
    with torch.inference_mode(), run.evaluation(1.0):
        for cond in "ab":
            x = torch.randn(1, 3, 48, 48)
            run.model_call(ModelCall(network, (cond,), 0), lambda x=x: network(x, torch.ones(1), context, extra["pooled_output"]))
    assert asked == [2 * 144 * 256 * 4]
    assert run.store.format.device == torch.device("cpu")


def test_no_room_for_the_cache_is_survived(model, monkeypatch):
    """If memory ends while a feature is kept, the run goes on in full, says so, and gives the uncached picture."""
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
    """Returns the multiply-adds that torch counts, which are independent of the pack's count."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops() // 2


@pytest.mark.parametrize(("kind", "share"), [("F", 0.0), ("c", 0.0), ("c", 0.25), ("c", 1.0), ("a", 0.0)])
def test_counted_macs_are_those_torch_sees(model, kind, share):
    """For every kind, with embedding and head, and attention in the plain math kernel. The first run does the pack's counting."""
    network, places = model.model.diffusion_model, Places()
    strategy = Strategy(DucaCycle(9, "a" if kind == "a" else "c", warmup=1), Reuse(), share)
    (context, extra), x = encode_prompt("pizza")[0], torch.randn(2, 3, 48, 48)
    context, pooled = context.repeat(2, 1, 1), extra["pooled_output"].repeat(2, 1)
    evaluations = []

    @torch.inference_mode()
    def run_once() -> list[int]:
        run = CacheRun(strategy, RunStart(torch.nn.Module(), FLUX, Timeline([1.0, 0.75, 0.5, 0.0]), range(3), places=places))

        def evaluate(sigma):
            with run.evaluation(sigma):
                run.model_call(ModelCall(network, ("a", "b"), 0), lambda: network(x.clone(), torch.full((2,), sigma), context, pooled))

        counts = [flops_of(lambda sigma=sigma: evaluate(sigma)) for sigma in (1.0, 0.75, 0.5)]
        evaluations.append(run.close().evaluations)
        return counts

    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        plain = flops_of(lambda: network(x.clone(), torch.ones(2), context, pooled))
        first, later = run_once(), run_once()
    assert [e.letter for e in evaluations[0]] == [e.letter for e in evaluations[1]] == ["F", *(kind * 2 if kind != "F" else "cc")]
    for run in evaluations:
        assert [e.full_macs for e in run] == [plain] * 3
        assert run[0].macs == plain
        if kind != "F":
            assert [e.macs for e in run[1:]] == first[1:] == later[1:]


@pytest.mark.parametrize(
    "settings",
    [{"speedup": 3.0}, {"mode": "paper", "cycle_length": 4, "token_share": 0.25}, {"mode": "forecast"}, {"plan": "FFiiaFiF"}],
    ids=str,
)
def test_costs_shown_before_a_run_are_those_counted_after_it(model, settings):
    """The page's preview, once the model was sampled, shows the share of multiply-adds and the bytes."""
    if "plan" in settings:
        factors = exact_factors(linear_sites_of(model.model.diffusion_model))
        made = FixedSettings(fixed=Strategy(Given(Plan.parse(settings["plan"])), Reuse(), factors=factors))
    else:
        made = Settings(**settings)
    patched = host.attach(model, made)
    sample(patched, steps=8)
    report = last_report(patched)
    strategy, plan = strategy_of(made, 8)
    costs = expected_costs(strategy, plan, report.shape)
    assert kinds(report) == str(plan) and costs.is_counted and costs.bytes == report.peak_bytes
    assert costs.compute == pytest.approx(sum(e.macs for e in report.evaluations) / sum(e.full_macs for e in report.evaluations))


def test_the_report_counts_evaluations_and_measures_time(model):
    """Heun makes 23 evaluations in 12 steps. Their times add up to no more than the run took, and the text names them."""
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
    assert "place        found and proved: skips double_blocks, single_blocks" in text
    assert report_data(report)["place"] == report.place
    assert f"23: {report.count(Kind.FULL)} full, 0 incremental, 0 conservative, {report.count(Kind.SKIPPED)} skipped" in text
    assert f"{report.compute_speedup:.2f}x less" in text
    assert len(report_data(report)["evaluations"]) == 23
    assert report_text(report, verbose=True).count("\n") == text.count("\n") + 23


def test_the_plot_shows_something(model):
    patched = cached(model, mode="paper", cycle_length=5)
    sample(patched)
    plot = report_plot(last_report(patched))
    assert plot.ndim == 4 and plot.shape[-1] == 3 and 0 <= plot.min() < plot.max() <= 1


def test_token_choice_is_the_same_for_every_cond_and_differs_between_evaluations():
    a, b = TokenSelection(0.2, 3), TokenSelection(0.2, 3)
    for selection in (a, b):
        selection.begin(4)
    first = a.tokens("img", 1, 3, 100, torch.device("cpu"))
    assert torch.equal(first, b.tokens("img", 1, 3, 100, torch.device("cpu")))
    assert len(set(first.tolist())) == 20
    assert not torch.equal(first, a.tokens("img", 2, 3, 100, torch.device("cpu")))  # other blocks choose other tokens
    a.begin(5)
    assert not torch.equal(first, a.tokens("img", 1, 3, 100, torch.device("cpu")))


def test_free_memory_is_the_patchers_where_it_knows(monkeypatch):
    """Dynamic patchers count weights that they would give back. For others, the host counts."""
    asked = types.SimpleNamespace(get_free_memory=lambda device: 7)
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda device: 3)
    assert host.free_memory(asked, torch.device("cpu")) == 7
    assert host.free_memory(types.SimpleNamespace(), torch.device("cpu")) == 3

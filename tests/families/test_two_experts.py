"""Wan 2.2's two experts, which are two models in two KSampler (Advanced), each with a DuCa Cache; and context windows, which split frames.

Runs the host's own nodes on small models of its classes.
"""

from __future__ import annotations

import weakref
from typing import Any

import comfy.model_management
import pytest
import torch
import zoo_video
from comfy_extras.nodes_context_windows import WanContextWindowsManualNode
from comfyui_duca.cache_core import CacheRun, Settings, StoreFormat
from comfyui_duca.cache_core.planning.policies import AlwaysCompute
from comfyui_duca.cache_core.store import FeatureStore
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.cache_report import CacheReport
from comfyui_duca.nodes.host import cached_model
from runs import kinds, network, report_of
from zoo_video import WAN_LATENT

import nodes as host_nodes

WAN = zoo_video.CASES[0]
STEPS, SWITCH = 20, 12
FULL = Strategy(AlwaysCompute())
NO_LATENT = {"samples": torch.zeros(1, *WAN_LATENT)}


@pytest.fixture(scope="module")
def experts() -> tuple[Any, Any]:
    """Returns the experts for high and low noise: of one structure, with different weights."""
    high, low = zoo_video.wan_t2v(), zoo_video.wan_t2v()
    for weight in network(high).parameters():
        weight.data *= 1.1
    return high, low


def sample(model, latent: dict, start: int, end: int, is_first: bool) -> dict:
    """Runs KSampler (Advanced). The first adds noise and leaves some; the second adds none and leaves none."""
    [made] = host_nodes.KSamplerAdvanced().sample(
        model, "enable" if is_first else "disable", 5, STEPS, 2.0, "euler", "simple", WAN.cond(1), WAN.cond(2), latent, start, end,
        "enable" if is_first else "disable",
    )  # fmt: skip
    return made


def both(high, low) -> tuple[dict, dict]:
    """Returns what the first half leaves, and the result."""
    noisy = sample(high, NO_LATENT, 0, SWITCH, is_first=True)
    return noisy, sample(low, noisy, SWITCH, 10000, is_first=False)


@pytest.fixture(scope="module")
def plain(experts) -> torch.Tensor:
    noisy, done = both(*experts)
    assert torch.isfinite(done["samples"]).all() and done["samples"].std() > 0.05, "a model that says nothing tests nothing"
    assert not torch.equal(noisy["samples"], done["samples"])
    return done["samples"]


def test_nothing_skipped_is_no_node(experts, plain):
    patched = [host.attach(model, FULL) for model in experts]
    assert torch.equal(both(*patched)[1]["samples"], plain)
    assert [kinds(model) for model in patched] == ["F" * SWITCH, "F" * (STEPS - SWITCH)]
    assert not any(report_of(model).notices for model in patched)


@pytest.mark.parametrize("settings", [Settings(speedup=2.0), Settings(mode="forecast", cycle_length=3, warmup=2)], ids=["auto", "forecast"])
def test_each_half_plans_its_own_steps(experts, plain, settings):
    high, low = (host.attach(model, settings) for model in experts)
    result = both(high, low)[1]["samples"]
    assert not torch.equal(result, plain) and torch.isfinite(result).all()
    for patched, steps in ((high, SWITCH), (low, STEPS - SWITCH)):
        report = report_of(patched)
        assert report.plan == kinds(patched) and len(report.plan) == steps, "as planned, for this half alone"
        assert report.plan[0] == "F" and "a" in report.plan and not report.notices
        assert [evaluation.step for evaluation in report.evaluations] == list(range(steps))
    sigmas = [evaluation.sigma for patched in (high, low) for evaluation in report_of(patched).evaluations]
    assert sigmas == pytest.approx(levels(experts[0])[:-1], rel=1e-5), "the whole schedule, once"


def test_a_half_is_planned_as_a_run_of_as_many_steps(experts):
    """The plan depends on the number of steps that are left, not on where they are."""
    high, low = (host.attach(model, Settings(speedup=2.0)) for model in experts)
    both(high, low)
    alone = host.attach(experts[0], Settings(speedup=2.0))
    sample(alone, NO_LATENT, STEPS - SWITCH, 10000, is_first=True)
    assert report_of(alone).plan == report_of(high).plan and len(report_of(low).plan) < len(report_of(high).plan)


def levels(model) -> list[float]:
    return comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", STEPS).tolist()


class Watched(CacheRun):
    """Notes, whenever a run starts, what the runs before it still hold."""

    started: list[Watched]
    held: list[int]
    kept: list[weakref.ref]
    alive: list[int]

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.held.append(sum(run.store.bytes for run in self.started))
        self.alive.append(sum(tensor() is not None for tensor in self.kept))
        super().__init__(*args, **kwargs)
        self.started.append(self)


def test_the_first_half_is_freed_before_the_second_begins(experts, monkeypatch):
    Watched.started, Watched.held, Watched.kept, Watched.alive = [], [], [], []
    put = FeatureStore.put

    def noted(store: FeatureStore, tensor: torch.Tensor):
        feature = put(store, tensor)
        Watched.kept.append(weakref.ref(feature.data))
        return feature

    monkeypatch.setattr(FeatureStore, "put", noted)
    monkeypatch.setattr(cached_model, "CacheRun", Watched)
    both(*(host.attach(model, Settings(speedup=2.0)) for model in experts))
    assert len(Watched.started) == 2 and all(run.report.peak_bytes > 0 for run in Watched.started)
    assert len(Watched.kept) > 4 and Watched.held == [0, 0] and Watched.alive == [0, 0]
    assert not any(tensor() is not None for tensor in Watched.kept) and not any(run.store.bytes for run in Watched.started)


def words_of(samples: dict, model) -> str:
    return CacheReport.execute(samples, model).args[0]


def test_the_reports_tell_each_half(experts):
    high, low = (host.attach(model, Settings(speedup=speed)) for model, speed in zip(experts, (2.0, 4.0)))
    noisy, done = both(high, low)
    first, second = words_of(noisy, high), words_of(done, low)
    assert report_of(high).plan in first and f"{SWITCH}: " in first
    assert report_of(low).plan in second and f"{STEPS - SWITCH}: " in second and first != second


def test_one_cache_for_both_halves_of_one_model(experts):
    """There are one DuCa Cache and two samplers, hence two runs. Each is found by its latent, and the second does not use the first."""
    model = experts[0]
    shared, apart = host.attach(model, Settings(speedup=2.0)), [host.attach(model, Settings(speedup=2.0)) for _ in range(2)]
    noisy, done = both(shared, shared)
    expected = both(*apart)
    assert torch.equal(noisy["samples"], expected[0]["samples"]) and torch.equal(done["samples"], expected[1]["samples"])
    book = host.book_of(shared)
    assert [len(book.report_of(part["samples"]).evaluations) for part in (noisy, done)] == [SWITCH, STEPS - SWITCH]
    assert f"{SWITCH}: " in words_of(noisy, shared) and f"{STEPS - SWITCH}: " in words_of(done, shared)


def test_a_second_half_that_is_cancelled_leaves_nothing(experts, plain):
    high, low = (host.attach(model, Settings(speedup=2.0, storage=StoreFormat(dtype=torch.float16))) for model in experts)
    noisy = sample(high, NO_LATENT, 0, SWITCH, is_first=True)
    calls: list[int] = []

    def stop(*_args: Any) -> None:
        calls.append(1)
        if len(calls) == 2:
            raise comfy.model_management.InterruptProcessingException

    hook = network(experts[1]).blocks[0].register_forward_pre_hook(stop)
    try:
        with pytest.raises(comfy.model_management.InterruptProcessingException):
            sample(low, noisy, SWITCH, 10000, is_first=False)
    finally:
        hook.remove()
    assert not report_of(low).is_complete and torch.equal(both(*experts)[1]["samples"], plain)


# --- context windows

FRAMES, WINDOW, OVERLAP = 6, 3, 1  # latents; the node counts frames of the video
LONG = {"samples": torch.zeros(1, 16, FRAMES, 4, 4)}


def windowed(model, schedule: str = "standard_static"):
    """Returns a model with the host's node for windows, with its defaults, but without shuffled noise if the node has that option."""
    values = {given.id: given.default for given in WanContextWindowsManualNode.define_schema().inputs if given.id != "model"}
    values |= {"context_length": 4 * (WINDOW - 1) + 1, "context_overlap": 4 * (OVERLAP - 1) + 1, "context_schedule": schedule}
    values |= {name: False for name in values if name == "freenoise"}
    return WanContextWindowsManualNode.execute(model, **values).args[0]


@pytest.fixture
def said(monkeypatch) -> list[str]:
    """Returns a list that collects the notices."""
    texts: list[str] = []
    monkeypatch.setattr(cached_model, "say", lambda text, _node=None: texts.append(text))
    return texts


@pytest.mark.parametrize("order", ["windows before the cache", "windows after the cache"])
@pytest.mark.parametrize("schedule", ["standard_static", "standard_uniform"])
def test_context_windows_are_computed_in_full_and_said_once(experts, said, order, schedule):
    model, settings = experts[0], Settings(speedup=2.0)
    expected = sample(windowed(model, schedule), LONG, 0, 10000, is_first=True)["samples"]
    assert not torch.equal(expected, sample(model, LONG, 0, 10000, is_first=True)["samples"]), "windows that change nothing test nothing"
    before = order.startswith("windows before")
    patched = host.attach(windowed(model, schedule), settings) if before else windowed(host.attach(model, settings), schedule)
    assert torch.equal(sample(patched, LONG, 0, 10000, is_first=True)["samples"], expected)
    report = report_of(patched)
    assert kinds(patched) == "F" * STEPS and "a" in report.plan and all(evaluation.calls > 1 for evaluation in report.evaluations)
    assert len(said) == len(report.notices) == 1 and "context windows: computed in full" in said[0] and report.peak_bytes == 0


def test_a_video_of_one_window_is_cached(experts, said):
    """Also on a model that was sampled with windows before."""
    short = {"samples": torch.zeros(1, 16, WINDOW, 4, 4)}
    patched = windowed(host.attach(experts[0], Settings(speedup=2.0)))
    sample(patched, LONG, 0, 10000, is_first=True)
    said.clear()
    result = sample(patched, short, 0, 10000, is_first=True)["samples"]
    assert kinds(patched) == report_of(patched).plan and "a" in kinds(patched) and not said
    without = sample(host.attach(experts[0], Settings(speedup=2.0)), short, 0, 10000, is_first=True)["samples"]
    assert torch.equal(result, without)


def test_windows_in_both_halves(experts, said):
    noisy = sample(windowed(experts[0]), LONG, 0, SWITCH, is_first=True)
    expected = sample(windowed(experts[1]), noisy, SWITCH, 10000, is_first=False)["samples"]
    high, low = (windowed(host.attach(model, Settings(speedup=2.0))) for model in experts)
    done = sample(low, sample(high, LONG, 0, SWITCH, is_first=True), SWITCH, 10000, is_first=False)
    assert torch.equal(done["samples"], expected) and len(said) == 2, "once a run"

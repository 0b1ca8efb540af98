"""Open-Sora's two lists in turn, its conservative evaluations against hooks on a model that computes everything, and its given frames."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from checks import assert_incremental_is_exact, assert_right, repeated
from comfyui_duca.cache_core import CacheRun, ModelCall, Plan, RunStart, Settings, Timeline, find_family
from comfyui_duca.cache_core.discovery.places import Places
from comfyui_duca.cache_core.engine import TokenSelection
from comfyui_duca.cache_core.families.opensora import OPENSORA
from comfyui_duca.cache_core.planning.policies import DucaCycle, Given
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from helpers.predictors import Innovating
from runs import cached, kinds, layers_of, network, report_of, sample
from stand_in_stdit import STDiT3Block
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo_opensora import CASES, LATENT, caption, opensora

FRAMES, PLACES, SEED = 3, 16, 7
STEPS = 10  # of the timeline; plans here are shorter
SUBLAYERS = ("attn", "cross_attn", "mlp")
TEXT_MASK = torch.ones(2, 7)
TEXT_MASK[0, 5:] = 0
GIVEN = torch.tensor([[0.0, 1.0, 1.0]])
FIRST_FRAME_GIVEN = CASES[0]._replace(cond=lambda seed: [[tokens, {**more, "x_mask": GIVEN}] for tokens, more in caption(seed)])


@pytest.fixture(scope="module")
def model():
    return opensora()


@pytest.fixture(scope="module")
def net(model):
    return network(model)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def inputs(step: int, given: bool) -> dict[str, Any]:
    """Returns videos for two conds, time, texts of 5 and 7 tokens, and which frames are sampled: never the first, the second later on."""
    x_mask = torch.tensor([[0.0, step > 0, 1.0], [0.0, step > 1, 1.0]])
    x, time = normal(step, 2, *LATENT), torch.full((2,), 900.0 - 90 * step)
    return {"x": x, "timestep": time, "context": normal(99, 2, 7, 24), "mask": TEXT_MASK, "x_mask": x_mask if given else None}


def make_run(plan: str, share: float, places: Places | None = None) -> CacheRun:
    timeline = Timeline([1 - i / STEPS for i in range(len(plan) + 1)])
    strategy = Strategy(Given(Plan.parse(plan)), Reuse(), share, SEED)
    return CacheRun(strategy, RunStart(torch.nn.Module(), OPENSORA, timeline, range(len(plan)), places=places))


@torch.inference_mode()
def evaluate(run: CacheRun, net, step: int, given: bool = False) -> Tensor:
    call = inputs(step, given)
    with run.evaluation(1 - step / STEPS):
        run.cond_batch()
        return run.model_call(ModelCall(net, ("a", "b"), call["x"].shape), lambda: net(**call))


class Exchanging:
    """Runs the model's own code, which computes everything, with hooks that return what was kept of a sublayer instead."""

    def __init__(self, net) -> None:
        self.net = net
        self.kept: dict[tuple, Tensor] = {}

    @torch.inference_mode()
    def __call__(self, call: dict, kind: str, fresh: Callable[[int], Tensor], rests: bool = False) -> Tensor:
        handles = []
        for path in ("spatial_blocks", "temporal_blocks"):
            for i, block in enumerate(getattr(self.net, path)):
                for name in SUBLAYERS:
                    exchange = self._exchange((path, i, name), kind, fresh, rests)
                    handles.append(getattr(block, name).register_forward_hook(exchange))
        try:
            return self.net(**call)
        finally:
            for handle in handles:
                handle.remove()

    def _exchange(self, key: tuple, kind: str, fresh: Callable[[int], Tensor], rests: bool):
        _, index, name = key

        def exchange(_module, _args, output):
            if kind == "c" and name == "mlp":
                output = torch.where(fresh(index)[None, :, None], output, self.kept[key])
            elif kind == "c" or (rests and name == "cross_attn"):
                output = self.kept[key]
            self.kept[key] = output.clone()
            return output

        return exchange


def masks(share: float, evaluation: int, blocks: int) -> Callable[[int], Tensor]:
    """Returns, for a block, a boolean mask of the tokens that it recomputes, from the same seeded selection."""
    selection = TokenSelection(share, SEED)
    selection.begin(evaluation)

    def fresh(block: int) -> Tensor:
        mask = torch.zeros(FRAMES * PLACES, dtype=torch.bool)
        tokens = selection.tokens("img", block, blocks, FRAMES * PLACES, torch.device("cpu"))
        if tokens is not None:
            mask[tokens] = True
        return mask

    return fresh


def distance(result: Tensor, expected: Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("given", [False, True], ids=["all frames sampled", "frames given"])
@pytest.mark.parametrize("share", [0.0, 0.37, 1.0])
def test_conservative_evaluations_are_those_of_exchanged_sublayers(net, share, given):
    """Two follow each other, as the second uses what the first wrote. At share 1 attentions are kept and every MLP is computed."""
    run, reference = make_run("Fcc", share), Exchanging(net)
    for step, kind in enumerate("Fcc"):
        call = inputs(step, given)
        expected = reference(call, kind, masks(share, step, len(net.spatial_blocks)))
        assert distance(evaluate(run, net, step, given), expected) < 2e-5
        with torch.inference_mode():
            assert kind == "F" or distance(expected, net(**call)) > 1e-3, "the same as without a cache"
    assert [e.kind.value for e in run.report.evaluations] == list("Fcc") and not run.report.notices


PLAN = "FFcFcFcFFc"  # cross-attention rests at 3 and, after it was computed at 5, at 7; a full evaluation after a full one is exact
RESTING = (3, 7)


def test_cross_attention_is_computed_in_every_other_full_evaluation(net):
    run, reference = make_run(PLAN, 0.37), Exchanging(net)
    for step, kind in enumerate(PLAN):
        expected = reference(inputs(step, True), kind, masks(0.37, step, len(net.spatial_blocks)), step in RESTING)
        assert distance(evaluate(run, net, step, True), expected) < 2e-5
    assert [e.kind.value for e in run.report.evaluations] == list(PLAN) and not run.report.notices


def test_a_resting_module_does_not_run_and_is_not_counted(net):
    """A second run is measured, as the first proves its place again in a later evaluation."""
    places, macs = Places(), []
    before, run = make_run("FF", 0.37, places), make_run(PLAN, 0.37, places)
    for step in range(2):
        evaluate(before, net, step)
    for step in range(len(PLAN)):
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            evaluate(run, net, step)
        macs.append(run.report.evaluations[step].macs)
        assert step == 0 or macs[-1] == pytest.approx(counter.get_total_flops() / 2, rel=1e-6)  # the first is proved
    full = [step for step, kind in enumerate(PLAN) if kind == "F"]
    assert {step for step in full if macs[step] < 0.85 * macs[0]} == set(RESTING)


def test_nothing_rests_where_no_conservative_evaluation_is_planned(net):
    run = make_run("FaFaFa", 0.37)
    for step in range(6):
        result = evaluate(run, net, step)
        with torch.inference_mode():
            assert torch.equal(result, net(**inputs(step, False))) == (step % 2 == 0)


def test_conds_in_calls_of_their_own_rest_alike(net):
    """Each cond has a text of its own length. They are called one after the other instead of together."""
    together, apart = make_run("FcFc", 0.37), make_run("FcFc", 0.37)
    for step in range(4):
        expected = evaluate(together, net, step, True)
        call = inputs(step, True)
        with torch.inference_mode(), apart.evaluation(1 - step / STEPS):
            apart.cond_batch()
            for i in range(2):
                own = {name: value[i : i + 1] for name, value in call.items()}
                result = apart.model_call(ModelCall(net, "ab"[i], own["x"].shape), lambda own=own: net(**own))
                assert distance(result, expected[i : i + 1]) < 2e-5
    macs = [[e.macs for e in run.report.evaluations] for run in (together, apart)]
    assert macs[0] == pytest.approx(macs[1], rel=0.01)


def test_paper_mode_rests_after_the_warm_up(model):
    """Bytes are as predicted. Every full evaluation costs as much as the first, except each cycle's second."""
    patched = host.attach(model, Strategy(DucaCycle(3, warmup=2), Reuse(), 0.1))
    sample(CASES[0], patched, 12)
    report = report_of(patched)
    assert kinds(patched) == "FFcaFcaFcaFc" and not report.notices
    assert report.peak_bytes == report.predicted_bytes
    macs = [e.macs for e in report.evaluations if e.kind.value == "F"]
    assert [one < 0.9 * macs[0] for one in macs] == [False, False, True, False, True]


def test_given_frames_are_sampled_as_without_the_cache(model):
    plain = sample(FIRST_FRAME_GIVEN, model)
    assert not torch.allclose(plain, sample(CASES[0], model), atol=1e-2), "the mask says nothing"
    patched = cached(model, "FFFFFFFF", Innovating(torch.zeros(16, 48)))
    assert torch.equal(sample(FIRST_FRAME_GIVEN, patched), plain) and not report_of(patched).notices
    patched = cached(model, "FaFaaFaa")
    assert torch.equal(sample(FIRST_FRAME_GIVEN, patched), repeated(FIRST_FRAME_GIVEN, model, "FaFaaFaa"))
    assert_incremental_is_exact(FIRST_FRAME_GIVEN, model, plain)


def test_every_layer_is_incremental_but_that_of_the_flat_text(model):
    names = {site.name for site in layers_of(CASES[0], model)}
    layers = ("attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2")
    assert names == {f"{path}.{i}.{layer}" for path in ("spatial_blocks", "temporal_blocks") for i in range(3) for layer in layers}


class OtherBlock(STDiT3Block):
    """A block that gets more arguments, such as its place in a schedule."""

    def forward(self, x, y, t, mask=None, x_mask=None, t0=None, T=None, S=None, timestep=None):  # noqa: N803
        return super().forward(x, y, t, mask, x_mask, t0, T, S)


@pytest.mark.parametrize(
    "change",
    [
        lambda net: net.temporal_blocks.pop(2),
        lambda net: net.spatial_blocks.__setitem__(1, net.temporal_blocks[1]),
        lambda net: setattr(net.temporal_blocks[2], "__class__", OtherBlock),
        lambda net: delattr(net.spatial_blocks[0].cross_attn, "kv_linear"),
        lambda net: setattr(net.x_embedder, "proj", torch.nn.Linear(16, 48)),
        lambda net: delattr(net, "temporal_blocks"),
    ],
    ids=["lists of different lengths", "two temporal in a row", "another forward", "another attention", "no patches", "one list"],
)
def test_another_structure_has_no_conservative_evaluation(change):
    net = network(opensora())
    assert find_family(net) is OPENSORA
    change(net)
    assert not find_family(net).is_conservative and find_family(net).name == "stdit3"


def test_blocks_that_are_told_more_are_found_by_watching_them():
    model = opensora()
    for block in network(model).temporal_blocks:
        block.__class__ = OtherBlock
    assert_right(CASES[0], model)
    with pytest.raises(ValueError, match="stdit3 models have no conservative evaluation"):
        sample(CASES[0], host.attach(model, Settings(mode="paper", speedup=2.0)))


def test_a_compiled_block_is_looked_through():
    net = network(opensora())
    net.spatial_blocks[0] = torch.compile(net.spatial_blocks[0])
    assert find_family(net) is OPENSORA

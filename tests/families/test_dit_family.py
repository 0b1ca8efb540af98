"""Conservative evaluations of DiT agree with an independent dense reference, and models of the public ExtraModels pack are served."""

from __future__ import annotations

import pytest
import torch
from checks import assert_incremental_is_exact, assert_skips_repeat, assert_the_input_is_kept
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, RunStart, Settings, Timeline, find_family
from comfyui_duca.cache_core.engine import TokenSelection
from comfyui_duca.cache_core.families.dit import DIT
from comfyui_duca.cache_core.planning.policies import DucaCycle
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from runs import kinds, report_of, sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo_dit import CASES, EXTRA_MODELS, SHAPE, assert_near, dit, network_of, normal, plain_of
from zoo_dit import DiT as PlainDiT

LABELS = torch.tensor([3, 10])  # the last one is the null class


# --- the family


TIMES = torch.tensor([999.0, 700.0, 400.0, 150.0])


def make_run(share: float) -> CacheRun:
    strategy = Strategy(DucaCycle(5, "c", warmup=1), Reuse(), share, 7)
    return CacheRun(strategy, RunStart(torch.nn.Module(), DIT, Timeline([1 - i / 4 for i in range(5)]), range(4)))


@torch.inference_mode()
def evaluate(run: CacheRun, network, step: int) -> torch.Tensor:
    x = normal(step, 2, 4, 20, 24)
    with run.evaluation(1 - step / 4):
        run.cond_batch()
        call = ModelCall(network, ("a", "b"), (x.shape, x.dtype))
        return run.model_call(call, lambda: network(x, TIMES[step].repeat(2), LABELS))


def dense(plain: PlainDiT, step: int, kept: dict[tuple[int, str], torch.Tensor], selection: TokenSelection | None) -> torch.Tensor:
    """Evaluates the plain network. With a selection, attention is taken from `kept`, and so is the MLP of tokens that are not selected."""

    def settling(key: tuple[int, str], module: torch.nn.Module):
        def forward(x: torch.Tensor) -> torch.Tensor:
            fresh = type(module).forward(module, x)
            if selection is not None:
                tokens = selection.tokens("img", key[0], SHAPE.depth, x.shape[1], torch.device("cpu")) if key[1] == "mlp" else None
                mask = torch.zeros(x.shape[1], 1, dtype=torch.bool)
                mask[[] if tokens is None else tokens] = True
                fresh = torch.where(mask, fresh, kept[key])
            kept[key] = fresh
            return fresh

        return forward

    for i, block in enumerate(plain.blocks):
        block.attn.forward, block.mlp.forward = settling((i, "attn"), block.attn), settling((i, "mlp"), block.mlp)
    return plain.raw(normal(step, 2, 4, 20, 24).double(), TIMES[step].repeat(2), LABELS)[:, :4]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_conservative_evaluations_match_the_dense_reference(share):
    """Two follow each other, as the second must use what the first wrote into the cache. No token, some and all of them are chosen."""
    network, run, kept = network_of(dit()), make_run(share), {}
    plain = plain_of(network, 10, 12)
    assert_near(evaluate(run, network, 0), dense(plain, 0, kept, None))
    for step in (1, 2):
        selection = TokenSelection(share, 7)
        selection.begin(step)
        result, expected = evaluate(run, network, step), dense(plain, step, kept, selection)
        assert_near(result, expected)
        assert (expected - dense(plain_of(network, 10, 12), step, {}, None)).abs().max() / expected.abs().max() > 1e-3
    assert [e.kind for e in run.report.evaluations] == [Kind.FULL, Kind.CONSERVATIVE, Kind.CONSERVATIVE]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_cost_of_a_conservative_evaluation_is_what_torch_counts(share):
    network, run = network_of(dit()), make_run(share)
    for step in (0, 1):
        evaluate(run, network, step)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        evaluate(run, network, 2)
    assert run.report.evaluations[2].macs == pytest.approx(counter.get_total_flops() / 2, rel=0.001)


@pytest.mark.parametrize("case", EXTRA_MODELS, ids=lambda case: type(network_of(case.make())).__name__)
def test_models_of_extra_models_are_served_by_the_same_families(case):
    model = case.make()
    net, plain = network_of(model), sample(case, model)
    assert find_family(net).name == case.name and find_family(net).is_conservative
    assert_skips_repeat(case, model, plain)
    assert_the_input_is_kept(case, model, net.blocks[0].mlp.fc2.out_features)
    assert f"blocks.{len(net.blocks) - 1}.attn.qkv" in assert_incremental_is_exact(case, model, plain)
    assert torch.equal(sample(case, model), plain)


@pytest.mark.parametrize("case", (*CASES, *EXTRA_MODELS), ids=lambda case: type(network_of(case.make())).__name__)
def test_conservative_evaluations_of_all_tokens_and_none_differ_and_cost_what_is_counted(case):
    model, results = case.make(), []
    for share in (0.001, 1.0):
        patched = host.attach(model, Settings(mode="paper", speedup=2.0, token_share=share))
        results.append(sample(case, patched))
        assert {"F", "c"} <= set(kinds(patched)) and not report_of(patched).notices
        assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes
    assert torch.isfinite(results[1]).all() and not torch.equal(*results)

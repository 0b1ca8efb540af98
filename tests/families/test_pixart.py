"""PixArt's evaluations agree with an independent dense reference, and its flattened text is served."""

from __future__ import annotations

import comfy.supported_models
import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, RunStart, Settings, Timeline
from comfyui_duca.cache_core.engine import TokenSelection
from comfyui_duca.cache_core.families.pixart import PIXART
from comfyui_duca.cache_core.planning.policies import DucaCycle
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from making import tiny
from reference_pixart import ReferencePixArt
from runs import kinds, report_of, sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo_image import CASES, normal, pixart

STEPS, TEXT = 4, 60
TIMES = torch.tensor([999.0, 700.0, 400.0, 150.0])


@pytest.fixture(scope="module")
def network():
    return pixart().model.diffusion_model


@pytest.fixture(scope="module")
def reference(network):
    return ReferencePixArt(network)


def make_run(share: float) -> CacheRun:
    strategy = Strategy(DucaCycle(STEPS + 1, "c", warmup=1), Reuse(), share, 7)
    return CacheRun(
        strategy,
        RunStart(torch.nn.Module(), PIXART, Timeline([1 - i / STEPS for i in range(STEPS + 1)]), range(STEPS)),
    )


def inputs(step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Returns a picture for each of two conds, the time, and the conds' texts."""
    return normal(step, 2, 4, 32, 40), TIMES[step].repeat(2), normal(99, 2, TEXT, 24)


@torch.inference_mode()
def evaluate(run: CacheRun, network, step: int) -> torch.Tensor:
    x, t, context = inputs(step)
    with run.evaluation(1 - step / STEPS):
        run.cond_batch()
        return run.model_call(ModelCall(network, ("a", "b"), (x.shape, x.dtype)), lambda: network(x, t, context))


def masks(share: float, blocks: int, length: int, evaluation: int):
    """Returns, for the reference, the boolean masks of recomputed tokens from the same seeded selection."""
    selection = TokenSelection(share, 7)
    selection.begin(evaluation)

    def fresh(block: int) -> torch.Tensor:
        mask = torch.zeros(length, dtype=torch.bool)
        tokens = selection.tokens("img", block, blocks, length, torch.device("cpu"))
        if tokens is not None:
            mask[tokens] = True
        return mask

    return fresh


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert (result.double() - expected).abs().max() / expected.abs().max() < 2e-5


def test_the_reference_is_the_host(network, reference):
    x, t, context = inputs(0)
    with torch.inference_mode():
        assert_near(network(x, t, context), reference(x, t, context)[0])


def test_full_evaluation_keeps_what_the_reference_computes(network, reference):
    run = make_run(0.25)
    evaluate(run, network, 0)
    expected = reference(*inputs(0))[1]
    slots = list(run._slots._slots.values())
    kept = {
        f"{stack}.{i}.{site}": torch.cat([slot.sublayers[stack, i, site].data for slot in slots]) for stack, i, site in slots[0].sublayers
    }
    assert set(kept) == set(expected)
    for name, value in kept.items():
        assert_near(value, expected[name])


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_conservative_evaluations_match_the_dense_reference(network, reference, share):
    """Two follow each other, as the second must use what the first wrote into the cache. No token, some and all of them are chosen."""
    run = make_run(share)
    evaluate(run, network, 0)
    results = [(*reference(*inputs(0)), None)]
    for step in (1, 2):
        result = evaluate(run, network, step)
        expected, kept = reference(*inputs(step), results[-1][1], masks(share, len(network.blocks), 16 * 20, step))
        assert_near(result, expected)
        assert (expected - reference(*inputs(step))[0]).abs().max() / expected.abs().max() > 1e-3, "the same as without a cache"
        results.append((expected, kept, result))
    assert [e.kind for e in run.report.evaluations] == [Kind.FULL, Kind.CONSERVATIVE, Kind.CONSERVATIVE]


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_the_cost_of_a_conservative_evaluation_is_what_torch_counts(network, share):
    run = make_run(share)
    for step in (0, 1):
        evaluate(run, network, step)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        evaluate(run, network, 2)
    assert run.report.evaluations[2].macs == pytest.approx(counter.get_total_flops() / 2, rel=0.001)


def test_the_text_is_left_to_the_host_in_incremental_evaluations(network):
    """It reaches the blocks as one row of 2 · 60 tokens, in which conds cannot be separated."""
    run = make_run(0.25)
    evaluate(run, network, 0)
    inside = {key[2] for key in run.report.shape.known.layer_calls}
    assert inside == {"attn.qkv", "attn.proj", "cross_attn.q_linear", "cross_attn.proj", "mlp.fc1", "mlp.fc2"}


def test_sigma_is_the_same_family():
    model = tiny(
        comfy.supported_models.PixArtSigma, image_model="pixart_sigma", num_heads=2, hidden_size=48, depth=2, caption_channels=24,
        micro_condition=False,
    )  # fmt: skip
    network = model.model.diffusion_model
    assert PIXART.matches(network)
    run = make_run(0.3)
    full = evaluate(run, network, 0)
    with torch.inference_mode():
        assert torch.equal(full, network(*inputs(0)))
    evaluate(run, network, 1)
    assert run.report.evaluations[1].kind is Kind.CONSERVATIVE and not run.report.notices


def test_the_paper_mode_samples_with_conservative_evaluations():
    case, model = CASES[0], pixart()
    patched = host.attach(model, Settings(mode="paper", speedup=1.5))
    result = sample(case, patched)
    assert torch.isfinite(result).all() and not torch.equal(result, sample(case, model))
    assert {"F", "c"} <= set(kinds(patched)) and not report_of(patched).notices
    assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes

"""Calibrated evaluations where a family's layers are called in ways of their own: tokens before the batch, tokens chosen for experts."""

from __future__ import annotations

from itertools import pairwise

import comfy.sample
import comfy.samplers
import comfy.supported_models as models
import pytest
import test_every_family as every
import torch
from comfy.model_patcher import ModelPatcher
from comfyui_duca.cache_core import find_family
from comfyui_duca.cache_core.calibration.low_rank import factorise_sites
from comfyui_duca.cache_core.engine.linear_sites import CalibratedLinears, find_linears
from making import Case, text, tiny
from test_every_family import cached, kinds, network, report_of, sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES
from zoo_image import hidream, with_more

NAMES = ("cosmos", "hidream")
RANK = 4


@pytest.fixture(scope="module", params=[case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return case.make()


@pytest.fixture(scope="module")
def linears(model) -> CalibratedLinears:
    """Factors of small rank, which lose most of the increments."""
    family = find_family(network(model))
    sites = find_linears(family, network(model))
    factors, _ = factorise_sites(sites, RANK, "svd", None, torch.float32, torch.device("cpu"), exact=True)
    return CalibratedLinears.bind(family, network(model), factors)


def test_costs_are_those_that_torch_counts(case, model, linears):
    """Of every evaluation on its own; layers that are left to the host cost what they do in a full one. And the bytes."""
    patched, totals = cached(model, "FiaFiF", linears=linears), [0]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the CPU's fused attention
        sample(case, patched, 6, callback=lambda *_args: totals.append(counter.get_total_flops() // 2))
    report = report_of(patched)
    counted = [after - before for before, after in pairwise(totals)]
    assert kinds(patched) == "FiaFiF"
    assert [evaluation.macs for evaluation in report.evaluations] == pytest.approx(counted, rel=0.03)
    assert counted[1] < 0.9 * counted[0] and counted[2] < 0.9 * counted[1]
    assert report.peak_bytes == report.predicted_bytes


def test_conds_may_be_called_apart_or_together_from_one_evaluation_to_the_next(case, model, linears, monkeypatch):
    """Two pictures each: what is kept of a layer is kept row by row, wherever the batch lies."""
    latent = torch.zeros(2, *case.latent)

    def run(is_apart) -> torch.Tensor:
        patched, step = cached(model, "FiFiiFii", linears=linears), [0]
        free = comfy.samplers.model_management.get_free_memory
        with monkeypatch.context() as patch:
            patch.setattr(comfy.samplers.model_management, "get_free_memory", lambda *a, **k: 0 if is_apart(step[0]) else free(*a, **k))
            result = comfy.sample.sample(
                model=patched, noise=comfy.sample.prepare_noise(latent, 5), steps=8, cfg=2.0, sampler_name="euler", scheduler="simple",
                positive=case.cond(1), negative=case.cond(2), latent_image=latent, seed=5, disable_pbar=True,
                callback=lambda number, *_args: step.__setitem__(0, number + 1),
            )  # fmt: skip
        assert kinds(patched) == "FiFiiFii" and not report_of(patched).notices
        assert [evaluation.calls for evaluation in report_of(patched).evaluations] == [1 + is_apart(number) for number in range(8)]
        return result

    together = run(lambda _step: False)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    for is_apart in (lambda step: step in (1, 4, 6), lambda step: step in (0, 2, 5)):
        torch.testing.assert_close(run(is_apart), together, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "hosts"), [("cosmos", ("adaLN_modulation",)), ("hidream", ("adaLN_modulation", "experts"))], ids=lambda value: str(value)[:8]
)
def test_the_host_computes_what_is_no_layer_of_tokens_and_nothing_else(name, hosts, monkeypatch):
    case = next(case for case in CASES if case.name == name)
    model, called = case.make(), []
    family = find_family(network(model))
    layers = {
        f"{stack.path}.{index}.{path}": layer
        for stack, index, block in family.placed(network(model))
        for path, layer in block.named_modules()
        if hasattr(layer, "in_features")
    }
    for path, layer in layers.items():
        monkeypatch.setitem(layer.__dict__, "forward", lambda x, path=path, forward=layer.forward: called.append(path) or forward(x))
    patched, by_step = cached(model, "Fi", linears=every.full_rank(family, network(model))), []
    sample(case, patched, 2, callback=lambda *_args: by_step.append(called.copy()) or called.clear())
    assert kinds(patched) == "Fi" and set(by_step[0]) == set(layers)
    assert set(by_step[1]) == {path for path in layers if any(f".{part}." in path for part in hosts)}


_TOLD = {"pooled_output": (1, 32), "conditioning_llama3": (1, 3, 5, 20)}


def without_experts() -> ModelPatcher:
    """As the host's class allows it: every feed-forward is a plain one."""
    return tiny(
        models.HiDream, image_model="hidream", patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, caption_channels=[24, 20], text_emb_dim=32, num_routed_experts=0,
        num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(32, 32), llama_layers=[0, 1, 2, 2],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "more"), [(hidream, {"concat_latent_image": (1, 16, 12, 16)}), (without_experts, {})], ids=["edit", "without experts"]
)
def test_other_models_of_hidream_at_full_rank(make, more):
    case = Case("hidream", make, (16, 12, 16), with_more(text(5, 24), **_TOLD, **more), lambda m: m.single_stream_blocks[-1])
    model = make()
    every.test_calibrated_evaluations_at_full_rank_are_the_uncached_ones(case, model, sample(case, model))
    every.test_multiply_adds_are_those_that_torch_counts(case, model)

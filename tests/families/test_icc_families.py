"""Incremental evaluations where layers are called in particular ways: tokens before the batch, tokens chosen for experts, or pieces."""

from __future__ import annotations

from functools import partial
from itertools import pairwise

import comfy.sample
import comfy.samplers
import comfy.supported_models as models
import pytest
import stand_in_kandinsky_cogvideox_anima as kandinsky
import torch
import torch.nn.functional as F  # noqa: N812
from checks import assert_costs_are_what_torch_counts, assert_incremental_is_exact
from comfy.model_patcher import ModelPatcher
from comfyui_duca.cache_core.calibration.low_rank import Magnitudes, factorise_sites, measuring
from comfyui_duca.cache_core.discovery.places import Places
from comfyui_duca.cache_core.engine.linear_sites import Factors
from comfyui_duca.nodes.host import starting
from helpers.factors import exact_factors
from making import Case, text, tiny
from runs import cached, kinds, known_of, network, report_of, sample, sites_of
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from zoo import CASES as EVERY
from zoo_image import hidream, with_more
from zoo_stand_ins import CASES as STAND_INS

CASES = ({case.name: case for case in EVERY} | {case.name: case for case in STAND_INS}).values()  # some are changed below
NAMES = ("cosmos", "hidream", "kandinsky5")
RANK = 4


@pytest.fixture(scope="module", params=[case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return case.make()


def small_rank(case: Case, model: ModelPatcher) -> Factors:
    """Returns factors that lose most of the increments."""
    sites = sites_of(model, known_of(case, model))
    factors, _ = factorise_sites(sites, RANK, "svd", None, torch.float32, torch.device("cpu"), exact=True)
    return factors


@pytest.fixture(scope="module")
def factors(case, model) -> Factors:
    return small_rank(case, model)


def test_costs_are_those_that_torch_counts(case, model, factors):
    """Every evaluation is compared separately, and so are the bytes. Layers that are left to the host cost as in a full evaluation."""
    patched, totals = cached(model, "FiaFiF", factors=factors), []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the counter does not know the CPU's fused attention
        sample(case, patched, 6, callback=lambda *_args: totals.append(counter.get_total_flops() // 2))
    report = report_of(patched)
    counted = [after - before for before, after in pairwise(totals)]  # the first evaluation includes the proof
    assert kinds(patched) == "FiaFiF"
    assert [evaluation.macs for evaluation in report.evaluations[1:]] == pytest.approx(counted, rel=0.03)
    assert counted[0] < 0.9 * counted[2] and counted[1] < 0.9 * counted[0]
    assert report.peak_bytes == report.predicted_bytes


def test_conds_may_be_called_apart_or_together_from_one_evaluation_to_the_next(case, model, factors, monkeypatch):
    """With two pictures for each cond, layers are kept row by row, wherever the batch axis is. Both forms of call are known by then:
    the first of a form in the process is computed in full.
    """
    latent = torch.zeros(2, *case.latent)
    monkeypatch.setattr(starting, "_places", Places())  # nothing is known from earlier tests

    def run(is_apart, plan: str = "FiFiiFii") -> torch.Tensor:
        patched, step = cached(model, "FiFiiFii", factors=factors), [0]
        free = comfy.model_management.get_free_memory
        with monkeypatch.context() as patch:
            patch.setattr(comfy.model_management, "get_free_memory", lambda *a, **k: 0 if is_apart(step[0]) else free(*a, **k))
            result = comfy.sample.sample(
                model=patched, noise=comfy.sample.prepare_noise(latent, 5), steps=8, cfg=2.0, sampler_name="euler", scheduler="simple",
                positive=case.cond(1), negative=case.cond(2), latent_image=latent, seed=5, disable_pbar=True,
                callback=lambda number, *_args: step.__setitem__(0, number + 1),
            )  # fmt: skip
        assert kinds(patched) == plan and not report_of(patched).notices
        assert [evaluation.calls for evaluation in report_of(patched).evaluations] == [1 + is_apart(number) for number in range(8)]
        return result

    together = run(lambda _step: False)
    assert not torch.allclose(together[0], together[1], atol=1e-2)
    run(lambda step: step == 3, "FiFFiFii")
    for is_apart in (lambda step: step in (1, 4, 6), lambda step: step in (0, 2, 5)):
        torch.testing.assert_close(run(is_apart), together, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("name", "hosts"),
    [
        ("cosmos", ("adaLN_modulation",)),
        ("hidream", ("adaLN_modulation", "experts")),
        ("kandinsky5", ("text_modulation", "visual_modulation")),
    ],
    ids=NAMES,
)
def test_the_host_computes_what_is_no_layer_of_tokens_and_nothing_else(name, hosts, monkeypatch):
    case = next(case for case in CASES if case.name == name)
    model = case.make()
    called: set[str] = set()
    by_step: list[set[str]] = []
    known = known_of(case, model)
    layers = {
        f"{passed.path}.{index}.{path}": layer
        for passed in known.place.passed
        for index, block in enumerate(passed.blocks(network(model)))
        for path, layer in block.named_modules()
        if hasattr(layer, "in_features")
    }

    def noting(path: str, forward):
        def noted(x):
            called.add(path)
            return forward(x)

        return noted

    def finish_step(*_args) -> None:
        by_step.append(set(called))
        called.clear()

    for path, layer in layers.items():
        monkeypatch.setitem(layer.__dict__, "forward", noting(path, layer.forward))
    patched = cached(model, "Fi", factors=exact_factors(sites_of(model, known)))
    sample(case, patched, 2, callback=finish_step)
    assert kinds(patched) == "Fi" and by_step[0] == set(layers)
    assert by_step[1] == {path for path in layers if any(f".{part}." in path for part in hosts)}


_CONDS = {"pooled_output": (1, 32), "conditioning_llama3": (1, 3, 5, 20)}


def without_experts() -> ModelPatcher:
    """Returns a model whose feed-forwards are all plain ones, as the host's class allows."""
    return tiny(
        models.HiDream, image_model="hidream", patch_size=2, in_channels=16, out_channels=16, num_layers=2, num_single_layers=2,
        attention_head_dim=16, num_attention_heads=2, caption_channels=[24, 20], text_emb_dim=32, num_routed_experts=0,
        num_activated_experts=2, axes_dims_rope=(8, 4, 4), max_resolution=(32, 32), llama_layers=[0, 1, 2, 2],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "more"), [(hidream, {"concat_latent_image": (1, 16, 12, 16)}), (without_experts, {})], ids=["edit", "without experts"]
)
def test_other_models_of_hidream_at_full_rank(make, more):
    case = Case("hidream", make, (16, 12, 16), with_more(text(5, 24), **_CONDS, **more), lambda m: m.single_stream_blocks[-1])
    model = make()
    assert assert_incremental_is_exact(case, model, sample(case, model))
    assert_costs_are_what_torch_counts(case, model)


def in_pieces(layer, x: torch.Tensor, count: int) -> torch.Tensor:
    return torch.cat([layer(piece) for piece in x.chunk(count, dim=1)], dim=1)


@pytest.fixture
def dividing(monkeypatch) -> None:
    """Divides Kandinsky 5's tokens as the host does above 8192: query and key of self-attention in two, the feed-forward in four."""

    def attention(self, x, context=None, freqs=None):
        if context is not None:
            return original(self, x, context, freqs)
        parts = in_pieces(self.to_query, x, 2), in_pieces(self.to_key, x, 2), self.to_value(x)
        q, k, v = (kandinsky.split(part, self.num_heads) for part in parts)
        return self.out_layer(kandinsky.attend(self.query_norm(q) + freqs, self.key_norm(k) + freqs, v))

    original, feed = (
        kandinsky.KandinskyAttention.forward,
        kandinsky.KandinskyFeedForward.forward,
    )
    monkeypatch.setattr(kandinsky.KandinskyAttention, "forward", attention)
    monkeypatch.setattr(kandinsky.KandinskyFeedForward, "forward", lambda self, x: in_pieces(partial(feed, self), x, 4))


def test_layers_that_get_their_tokens_in_pieces(dividing, monkeypatch):
    """45 tokens make uneven pieces. The text's feed-forward is divided here too, but it is left to the host in any case."""
    case = next(case for case in CASES if case.name == "kandinsky5")._replace(latent=(4, 3, 6, 10))
    model, lengths = case.make(), []
    network(model).visual_transformer_blocks[0].feed_forward.in_layer.register_forward_hook(
        lambda _m, given, _r: lengths.append(given[0].shape[1])
    )
    plain = sample(case, model)
    assert lengths[:4] == [12, 12, 12, 9]
    assert assert_incremental_is_exact(case, model, plain)
    factors = small_rank(case, model)
    test_costs_are_those_that_torch_counts(case, model, factors)
    test_conds_may_be_called_apart_or_together_from_one_evaluation_to_the_next(case, model, factors, monkeypatch)


def test_tokens_divided_in_another_way_are_computed_in_full(dividing, monkeypatch):
    case = next(case for case in CASES if case.name == "kandinsky5")
    model = case.make()
    plain, patched = sample(case, model), cached(model, "FFFFFFFi", factors=small_rank(case, model))

    def divide(number, *_args):
        if number == 6:
            feed = kandinsky.KandinskyFeedForward
            monkeypatch.setattr(feed, "forward", lambda self, x: self.out_layer(in_pieces(lambda y: F.gelu(self.in_layer(y)), x, 3)))

    torch.testing.assert_close(sample(case, patched, callback=divide), plain, atol=1e-5, rtol=1e-4)
    assert kinds(patched) == "FFFFFFFF" and any("is called with another shape" in notice for notice in report_of(patched).notices)


@pytest.mark.parametrize("name", ["cosmos", "cosmos_predict2", "anima", "kandinsky5"])
def test_magnitudes_are_heard_wherever_batch_and_tokens_lie(name, dividing, monkeypatch):
    """Feed-forwards of Cosmos and Anima get a grid, and some of Kandinsky's layers get pieces, each of which is compared with itself."""
    case = next(case for case in CASES if case.name == name)
    model = case.make()
    sites, seen = sites_of(model, known_of(case, model)), {}
    plain, steps = Magnitudes(), Magnitudes(increments=True)
    for site in sites:
        heard = seen.setdefault(site.name, [])
        site.module.register_forward_hook(lambda _m, args, result, heard=heard: heard.append((args[0].clone(), result.clone())))
    original = network(model).forward

    def measured(x, *args, **kwargs):
        with measuring("ab"[: len(x)], sites, plain, steps):
            return original(x, *args, **kwargs)

    monkeypatch.setitem(network(model).__dict__, "forward", measured)
    sample(case, model, 3)
    for site in sites:
        calls = seen[site.name]
        each = len(calls) // 3
        for side in (0, 1):
            values = torch.cat([call[side].flatten(0, -2) for call in calls])
            moved = torch.cat([(later[side] - before[side]).flatten(0, -2) for before, later in zip(calls, calls[each:])])
            torch.testing.assert_close(plain.means(site)[side], values.double().abs().mean(0), rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(steps.means(site)[side], moved.double().abs().mean(0), rtol=1e-3, atol=1e-6)

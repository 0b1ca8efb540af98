"""Conservative evaluations of the image families (and Stable Audio) agree with references of their blocks, run by the host's models."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checks import assert_cost_is_what_torch_counts
from comfyui_duca.cache_core import Settings
from comfyui_duca.cache_core.engine import TokenSelection
from comfyui_duca.cache_core.families.shared.replaying import sandwiched
from comfyui_duca.nodes import host
from making import Case, text
from reference_blocks import REFERENCES, arguments
from runs import STEPS, cached, kinds, network, report_of, sample
from zoo import CASES
from zoo_image import controlled, hidream, normal, omnigen, with_more

PLAN = "FcacccFc"  # conservative ones after a full one, after one another and after a skip; and a skip after one
SHARES = (0.0, 0.37, 1.0)


def _variants() -> dict[str, tuple[Case, Callable]]:
    """Returns cases, each with what is done to its model: the families' own, and what may be beside text and image in the streams."""
    plain = {f"{case.name} {case.make.__name__}": case for case in CASES if case.name in REFERENCES}
    by_name = {case.name: case for case in plain.values()}
    reference = text(7, 24, attention_mask=torch.ones(1, 7, dtype=torch.long), reference_latents=[normal(3, 1, 16, 8, 6)])
    edited = with_more(text(5, 24), pooled_output=(1, 32), conditioning_llama3=(1, 3, 5, 20), concat_latent_image=(1, 16, 12, 16))
    more = {
        "omnigen reference": Case("omnigen", omnigen, (16, 12, 16), reference, lambda m: m.layers[-1]),
        "hidream edit": Case("hidream", hidream, (16, 12, 16), edited, lambda m: m.single_stream_blocks[-1]),
        "qwen_image reference": by_name["qwen_image"]._replace(cond=text(7, 24, reference_latents=[normal(3, 1, 16, 1, 8, 6)])),
        "sd3 odd": by_name["sd3"]._replace(latent=(16, 11, 13)),
    }
    cases = {name: (case, lambda model: model) for name, case in (plain | more).items()}
    for name, width, count in (("sd3", 128, 3), ("hydit", 48, 2)):
        tokens = by_name[name].latent[1] * by_name[name].latent[2] // 4
        residuals = [normal(i, 1, tokens, width) for i in range(count)]
        cases[f"{name} control"] = by_name[name], partial(controlled, residuals=residuals)
    return cases


VARIANTS = _variants()


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request) -> tuple[Case, Callable]:
    return VARIANTS[request.param]


@pytest.fixture(scope="module")
def case(variant) -> Case:
    return variant[0]


@pytest.fixture(scope="module")
def model(variant):
    return variant[1](variant[0].make())


@pytest.fixture(scope="module")
def plain(case, model) -> torch.Tensor:
    return sample(case, model)


class Dense:
    """Gives the references' sublayers the value that the plan's kind goes on with.

    That is the new value in full and skipped evaluations. In conservative ones it is the kept value, except for chosen tokens of
    the streams that are renewed. In skipped ones the last block returns its last result, whatever the others gave.
    """

    def __init__(self, plan: str, share: float) -> None:
        self.plan, self.step = plan, -1
        self.kept: dict[tuple, torch.Tensor] = {}
        self.last: Any = None
        self.selection = TokenSelection(share, 0)

    def forward(self, at: tuple[str, int], blocks: int, is_first: bool, is_last: bool, by_name: Callable, compute: Callable) -> Callable:
        def answer(*args: Any, **kwargs: Any) -> Any:
            if is_first:
                self.step += 1
                self.selection.begin(self.step)
            result = compute(by_name(args, kwargs), partial(self.settle, at, blocks))
            if is_last and self.plan[self.step] != "a":
                self.last = result
            if not is_last:
                return result
            return tuple(x if x is None else x.clone() for x in self.last) if isinstance(self.last, tuple) else self.last.clone()

        return answer

    def settle(self, at: tuple[str, int], blocks: int, name: str, value: torch.Tensor, stream: str = "") -> torch.Tensor:
        if self.plan[self.step] == "a":
            return value
        if self.plan[self.step] == "c":
            mask = torch.zeros(value.shape[1], dtype=torch.bool)
            tokens = self.selection.tokens(stream, at[1], blocks, value.shape[1], value.device) if stream else None
            if tokens is not None:
                mask[tokens] = True
            value = torch.where(mask[None, :, None], value, self.kept[(*at, name)])
        self.kept[(*at, name)] = value.clone()
        return value


@contextmanager
def written_out(case: Case, model, plan: str, share: float) -> Iterator[Dense]:
    """Puts the references in the places of the host's blocks."""
    dense, placed = Dense(plan, share), REFERENCES[case.name].blocks(network(model))
    for number, (path, i, blocks, block, reference) in enumerate(placed):
        ends = number == 0, number == len(placed) - 1
        by_name, compute = partial(arguments, block.forward), partial(reference, block)
        block.__dict__["forward"] = dense.forward((path, i), blocks, *ends, by_name, compute)
    try:
        yield dense
    finally:
        for _, _, _, block, _ in placed:
            del block.__dict__["forward"]


def assert_near(result: torch.Tensor, expected: torch.Tensor) -> None:
    assert float((result - expected).abs().max() / expected.abs().max()) < 2e-5


def test_the_references_are_the_hosts_blocks(case, model, plain):
    with written_out(case, model, "F" * STEPS, 0.0) as dense:
        assert_near(sample(case, model), plain)
    assert dense.step == STEPS - 1, "both conds are to be in one call"


@pytest.mark.parametrize("share", SHARES)
def test_conservative_evaluations_are_those_of_the_references(case, model, plain, share):
    """No token, some and all of them are chosen. At share 0 only gates and shifts are new; at share 1 everything but self-attention is."""
    patched = cached(model, PLAN, share=share)
    result = sample(case, patched)
    assert kinds(patched) == PLAN and not report_of(patched).notices
    assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes
    with written_out(case, model, PLAN, share):
        expected = sample(case, model)
    assert_near(result, expected)
    assert (expected - plain).abs().max() > 0.005, "the same as without a cache"


def test_chosen_tokens_make_a_difference(case, model):
    results = [sample(case, cached(model, PLAN, share=share)) for share in SHARES]
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(results))


@pytest.mark.parametrize("share", SHARES)
def test_the_cost_of_a_conservative_evaluation_is_what_torch_counts(case, model, share):
    assert_cost_is_what_torch_counts(case, cached(model, "Fcc", share=share), "c", steps=3)


def test_the_paper_mode_samples(case, model, plain):
    patched = host.attach(model, Settings(mode="paper", speedup=1.5))
    result = sample(case, patched)
    assert torch.isfinite(result).all() and not torch.equal(result, plain)
    assert {"F", "c"} <= set(kinds(patched)) and not report_of(patched).notices


def computed_in_full(case: Case, model, plain: torch.Tensor) -> str:
    """Asserts that conservative evaluations are computed in full. Returns the notices."""
    patched = cached(model, PLAN.replace("a", "c"), share=0.37)
    assert torch.equal(sample(case, patched), plain)
    assert kinds(patched) == "F" * STEPS
    return " ".join(report_of(patched).notices)


@pytest.mark.parametrize("name", ["qwen_image make", "lumina z_image"])
def test_pictures_modulated_apart_are_computed_in_full(name, monkeypatch):
    """Newer hosts pass the blocks what says so. Here the blocks ignore it."""
    case, model = VARIANTS[name][0], VARIANTS[name][0].make()
    plain = sample(case, model)
    block_type = type(case.last(network(model)))
    call, forward = block_type.__call__, block_type.forward
    monkeypatch.setattr(block_type, "__call__", lambda *args, **more: call(*args, **(more | {"timestep_zero_index": 5})))
    monkeypatch.setattr(block_type, "forward", lambda *args, timestep_zero_index, **more: forward(*args, **more))
    assert "a modulation of their own" in computed_in_full(case, model, plain)


def test_a_sublayer_that_the_host_goes_past_is_computed_in_full(monkeypatch):
    """Newer hosts use one kernel instead of the module for some formats of weights."""
    case, _ = VARIANTS["lumina z_image"]
    model = case.make()
    plain = sample(case, model)
    past = type(case.last(network(model)).feed_forward)
    monkeypatch.setattr(past, "__call__", lambda self, x: past.forward(self, x))
    assert "nothing is kept of" in computed_in_full(case, model, plain)


def test_gates_of_stable_audio_are_computed_in_full():
    """No released checkpoint has such gates."""
    case, _ = VARIANTS["stable_audio make"]
    model = case.make()
    inner = network(model)
    inner.global_cond_type = "adaLN"
    for i, layer in enumerate(inner.transformer.layers):
        layer.global_cond_dim, layer.has_global_cond = layer.dim, True  # older and newer hosts ask in these ways
        layer.to_scale_shift_gate = lambda given, weight=normal(i, layer.dim, 6 * layer.dim) / layer.dim: given @ weight
    assert "gates" in computed_in_full(case, model, sample(case, model))


def test_what_overflows_in_half_precision_is_clipped_between_the_norms():
    """Newer hosts do so for Z-Image."""
    kept = {"x.attn": torch.full((1, 2, 4), float("inf")).half(), "x.mlp": torch.full((1, 2, 4), -float("inf")).half()}
    cached = SimpleNamespace(all_tokens=kept.get, choose=lambda _stream, _length: None)
    halved = SimpleNamespace(ffn_norm2=lambda x: x / 2)
    ones = [torch.full((1, 1, 4), 20.0).half()] * 4
    result = sandwiched(cached, "x", torch.zeros(1, 2, 4).half(), ones, halved, lambda x: x / 4)
    assert torch.equal(result, torch.full((1, 2, 4), 65504 / 4 - 65504 / 2).half())

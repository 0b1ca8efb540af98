"""Checks that every model must pass: skips, incremental evaluations, kept inputs and counted costs are right."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from comfyui_duca.cache_core import FAMILIES, find_family
from comfyui_duca.cache_core.families import undescribed
from helpers.factors import exact_factors
from helpers.predictors import Innovating
from making import Case
from runs import PLAN, STEPS, cached, input_channels, kinds, layers_of, network, report_of, sample
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Last = Callable[[Any], torch.nn.Module]  # finds the last block of a network


def copied(value: Any) -> Any:
    """Copies a block's result, which may be several streams. Tokens are made contiguous, as they are kept."""
    if isinstance(value, (tuple, list)):
        return type(value)(copied(part) for part in value)
    if not isinstance(value, Tensor):
        return value
    return value.clone(memory_format=torch.contiguous_format) if value.ndim == 3 else value.clone()


def repeated(case: Case, model: Any, plan: str, last: Last | None = None) -> Tensor:
    """Samples with skips made by a hook on the last block: it returns the last full evaluation's result again, while all blocks run."""
    kept: dict[int, Any] = {}
    calls: list[int] = []

    def hook(_module: Any, _args: tuple, result: Any) -> Any:
        step, cond = divmod(len(calls), case.calls)
        calls.append(1)
        if plan[step] == "F":
            kept[cond] = copied(result)
            return result
        return copied(kept[cond])

    handle = (last or case.last)(network(model)).register_forward_hook(hook)
    try:
        return sample(case, model)
    finally:
        handle.remove()


def sampled(case: Case, model: Any) -> Tensor:
    """Samples without a cache, and checks that the result means something."""
    plain = sample(case, model)
    assert torch.isfinite(plain).all() and plain.std() > 0.05, "a model that says nothing tests nothing"
    return plain


def assert_the_family_is_known_once(case: Case, model: Any) -> None:
    """A file knows it, or else its class's name does."""
    names = [family.name for family in FAMILIES if family.matches(network(model))]
    assert names in ([], [case.name])
    family = find_family(network(model))
    assert family.name == (names[0] if names else undescribed(network(model)).name)
    assert all(stack.blocks(network(model)) for stack in family.stacks)


def assert_listening_changes_nothing(case: Case, model: Any, plain: Tensor) -> None:
    patched = cached(model, "F" * STEPS)
    assert torch.equal(sample(case, patched), plain)
    assert kinds(patched) == "F" * STEPS and not report_of(patched).notices


def assert_skips_repeat(case: Case, model: Any, plain: Tensor, plan: str = PLAN, last: Last | None = None) -> None:
    """Skips give what the last block gave, at a place that was found without help, and keep as many bytes as predicted."""
    patched = cached(model, plan)
    result = sample(case, patched)
    report = report_of(patched)
    assert kinds(patched) == plan and not report.notices and report.place.startswith("found and proved: skips ")
    assert torch.equal(result, repeated(case, model, plan, last)) and not torch.equal(result, plain)
    assert report.peak_bytes == report.predicted_bytes > 0


def assert_incremental_is_exact(case: Case, model: Any, plain: Tensor, atol: float = 2e-4) -> set[str]:
    """Incremental evaluations with factors of full rank agree with uncached ones. Returns the names of the layers that were incremental."""
    sites = layers_of(case, model)
    patched = cached(model, "FiiFiiFi", factors=exact_factors(sites))
    result = sample(case, patched)
    assert kinds(patched) == "FiiFiiFi" and not report_of(patched).notices
    torch.testing.assert_close(result, plain, atol=atol, rtol=10 * atol)
    return {site.name for site in sites}


def assert_the_input_is_kept(case: Case, model: Any, channels: int) -> None:
    """The input is kept for as many tokens as the hidden state (which has `channels`). What the embedding makes of it does not matter."""
    results = []
    for scale in (0.0, 0.01):
        patched = cached(model, PLAN, Innovating(torch.full((input_channels(model), channels), scale)))
        results.append(sample(case, patched))
        assert kinds(patched) == PLAN and not report_of(patched).notices
        assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes
    assert not torch.equal(*results)


def assert_cost_is_what_torch_counts(case: Case, patched: Any, letter: str, steps: int = STEPS) -> None:
    """Compares the cost of the plan's last evaluation, which is of kind `letter` and not the first of it. Each kind is counted once."""
    flops: list[float] = []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the counter does not know the CPU's fused attention
        sample(case, patched, steps, callback=lambda *_: flops.append(counter.get_total_flops()))
    last = report_of(patched).evaluations[-1]
    assert last.kind.value == letter and 2 * last.macs == pytest.approx(flops[-1] - flops[-2], rel=0.001)


def assert_costs_are_what_torch_counts(case: Case, model: Any) -> None:
    """The pack counts each kind once, with fused attention. Every later evaluation is compared with torch's count of plain attention.

    The two agree within 3 %: hosts keep something of the text from a run's first call, which makes the others cheaper. The run is a second
    one, as the first proves its place again in a later evaluation.
    """
    sample(case, cached(model, "FFF"), 3)
    patched, totals = cached(model, "FFaFaF"), []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # the counter does not know the CPU's fused attention
        sample(case, patched, 6, callback=lambda *_args: totals.append(counter.get_total_flops() / 2))
    assert kinds(patched) == "FFaFaF"
    counted = [after - before for before, after in pairwise(totals)]  # the first evaluation includes the proof
    fewer = 0.001 * counted[0] if case.name == "minimax_h3" else 0.0  # at the first noise level, video and sound have the same time
    assert [evaluation.macs for evaluation in report_of(patched).evaluations[1:]] == pytest.approx(counted, rel=0.03, abs=fewer)
    assert all(evaluation.full_macs == pytest.approx(counted[0], rel=0.03) for evaluation in report_of(patched).evaluations)


def assert_right(case: Case, model: Any, last: Last | None = None, has_incremental: bool = True) -> Tensor:
    """Makes all checks and returns what is sampled without a cache. `has_incremental`: whether the model has incremental evaluations."""
    plain = sampled(case, model)
    assert_listening_changes_nothing(case, model, plain)
    assert_skips_repeat(case, model, plain, last=last)
    if has_incremental:
        assert assert_incremental_is_exact(case, model, plain)
    return plain

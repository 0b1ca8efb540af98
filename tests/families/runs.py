"""What tests of single families ask of any model: what was found out about it, and whether skips and calibrated evaluations are right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from comfyui_duca.cache_core import Plan, Settings, find_family
from comfyui_duca.cache_core.discovery.places import Known
from comfyui_duca.cache_core.engine.linear_sites import find_linears
from comfyui_duca.cache_core.policies import AlwaysCompute, Given
from comfyui_duca.cache_core.predictors import Predictor, Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from making import Case
from test_every_family import kinds, network, report_of, sample
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

Sampling = Callable[..., torch.Tensor]  # of a model, with the sampler's options


def cached(model: Any, plan: str, predictor: Predictor | None = None, share: float = 0.1, factors: dict | None = None) -> Any:
    strategy = Strategy(Given(Plan.parse(plan)), predictor or Reuse(), token_share=share, factors=factors)
    return host.attach(model, Settings(chosen=strategy))


def known_of(run: Sampling, model: Any) -> Known:
    patched = host.attach(model, Settings(chosen=Strategy(AlwaysCompute())))
    run(patched)
    return report_of(patched).shape.known


def kept_of(patched: Any) -> list[tuple[int, int]]:
    """Tokens and channels of what the last run kept of a batch row's hidden state."""
    known = report_of(patched).shape.known
    return [(kept.rows_and_tokens // known.rows, kept.shape[-1]) for kept in known.place.kept]


def exact_factors(model: Any, known: Known) -> dict[str, torch.Tensor]:
    """Of all layers that were found: each matrix itself, and the identity, which lose nothing."""
    factors = {}
    for site in find_linears(find_family(network(model)), known.linears, network(model)):
        weight = site.module.weight.detach()
        for part in site.parts:
            own = weight[part.rows or slice(None)]
            factors |= {f"{site.key(part)}.A": own.clone(), f"{site.key(part)}.B": torch.eye(own.shape[1])}
    return factors


def repeated(run: Sampling, model: Any, last: torch.nn.Module, where: int | None, plan: str) -> torch.Tensor:
    """Skips by a hook on the last block: all blocks run, and it gives out its last full hidden state again."""
    kept, steps = [], iter(plan)

    def again(_module: Any, _args: Any, result: Any) -> Any:
        hidden = result if where is None else result[where]
        if next(steps) == "F":
            kept[:] = [hidden.clone(memory_format=torch.contiguous_format) if hidden.ndim == 3 else hidden.clone()]
            return result
        return kept[0].clone() if where is None else tuple(kept[0].clone() if i == where else value for i, value in enumerate(result))

    handle = last.register_forward_hook(again)
    try:
        return run(model)
    finally:
        handle.remove()


def assert_skips_repeat(run: Sampling, model: Any, last: torch.nn.Module, where: int | None, plan: str, plain: torch.Tensor) -> None:
    patched = cached(model, plan)
    result = run(patched)
    assert kinds(patched) == plan and not report_of(patched).notices
    assert torch.equal(result, repeated(run, model, last, where, plan)) and not torch.equal(result, plain)
    assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes > 0


def assert_calibrated_is_exact(run: Sampling, model: Any, plain: torch.Tensor) -> set[str]:
    """At full rank. Returns the names of the layers that answered so."""
    factors = exact_factors(model, known_of(run, model))
    patched = cached(model, "FiiFiiFi", factors=factors)
    result = run(patched)
    assert kinds(patched) == "FiiFiiFi" and not report_of(patched).notices
    torch.testing.assert_close(result, plain, atol=2e-4, rtol=2e-3)
    return {name.rpartition(".")[0].rpartition(".")[0] for name in factors}


class Innovating(Predictor):
    """Keeps the input beside every hidden state, as a calibrated forecast does: reuse, and what the input moved by, times `scale`."""

    history = 2
    uses_input = True

    def __init__(self, shape: tuple[int, int], scale: float) -> None:
        self.matrix = torch.full(shape, scale)

    def weights(self, anchors: Any, time: float) -> Any:
        return Reuse().weights(anchors, time)

    def correction(self, anchors: Any, time: float) -> torch.Tensor:
        return self.matrix

    @property
    def without_input(self) -> Predictor:
        return Reuse()


def input_channels(model: Any) -> int:
    """Of the model's input tokens: what the embedding's weights take."""
    module = network(model).get_submodule(find_family(network(model)).embed)
    (weight,) = [weight for weight in module.parameters() if weight.ndim > 1]
    return weight[0].numel()


def assert_the_input_is_kept(run: Sampling, model: Any, channels: int) -> None:
    """Of as many tokens as the hidden state; channels: of that. How the embedding sees it is no business of ours."""
    results = []
    for scale in (0.0, 0.01):
        patched = cached(model, "FaFaFaFa", Innovating((input_channels(model), channels), scale))
        results.append(run(patched))
        assert kinds(patched) == "FaFaFaFa" and not report_of(patched).notices
        assert report_of(patched).peak_bytes == report_of(patched).predicted_bytes
    assert not torch.equal(*results)


def assert_cost_is_what_torch_counts(run: Sampling, patched: Any, letter: str) -> None:
    """Of the plan's last evaluation, which is one of this kind and not the first: what an evaluation costs is counted once."""
    flops: list[float] = []
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:  # it does not know the CPU's fused attention
        run(patched, callback=lambda *_: flops.append(counter.get_total_flops()))
    last = report_of(patched).evaluations[-1]
    assert last.kind.value == letter and 2 * last.macs == pytest.approx(flops[-1] - flops[-2], rel=0.001)


def sampling(case: Case) -> Sampling:
    return lambda model, **more: sample(case, model, **more)

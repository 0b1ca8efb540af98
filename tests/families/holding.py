"""What holds of any model, for tests of single ones: what skips give, factors that lose nothing, forecasts that look at the input."""

from __future__ import annotations

from typing import Any

import torch
from comfyui_duca.cache_core import Plan, Settings, find_family
from comfyui_duca.cache_core.engine.linear_sites import LinearSite, find_linears
from comfyui_duca.cache_core.policies import Given
from comfyui_duca.cache_core.predictors import Predictor, Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from making import Case
from test_every_family import STEPS, kinds, network, report_of, sample
from torch import Tensor

PLAN = "FaFaFaFa"


def cached(model: Any, plan: str, predictor: Predictor = Reuse(), factors: dict[str, Tensor] | None = None) -> Any:
    return host.attach(model, Settings(chosen=Strategy(Given(Plan.parse(plan)), predictor, factors=factors)))


def cached_run(case: Case, model: Any, plan: str = PLAN) -> Any:
    """The report of a run."""
    patched = cached(model, plan)
    sample(case, patched)
    return report_of(patched)


class Innovating(Predictor):
    """Keeps the input beside every hidden state, as a calibrated forecast does: reuse, and what the input moved by."""

    history = 2
    uses_input = True

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix

    def weights(self, anchors: Any, time: float) -> Any:
        return Reuse().weights(anchors, time)

    def correction(self, anchors: Any, time: float) -> Tensor:
        return self.matrix

    @property
    def without_input(self) -> Predictor:
        return Reuse()


def repeated(case: Case, model: Any, plan: str, last: Any = None) -> Tensor:
    """Skips by a hook on the last block: it gives out what it gave in the last full evaluation, while all blocks run."""
    kept: dict[int, Any] = {}
    calls: list[int] = []

    def copied(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(copied(part) for part in value)
        return value.clone(memory_format=torch.contiguous_format) if isinstance(value, Tensor) else value

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


def kept_tokens(report: Any) -> list[int]:
    """Of one row, of every tensor that is kept."""
    return [entry.rows_and_tokens // report.shape.known.rows for entry in report.shape.known.place.kept]


def linear_sites(case: Case, model: Any) -> list[LinearSite]:
    """The linear layers that a run finds to be given tokens."""
    report = cached_run(case, model)
    return find_linears(find_family(network(model)), report.shape.known.linears, network(model))


def full_rank(case: Case, model: Any) -> dict[str, Tensor]:
    """Factors that lose nothing: each matrix itself, and the identity."""
    factors = {}
    for site in linear_sites(case, model):
        for part in site.parts:
            own = site.module.weight.detach()[part.rows or slice(None)]
            factors |= {f"{site.key(part)}.A": own.clone(), f"{site.key(part)}.B": torch.eye(own.shape[1])}
    return factors


# -- what is to hold ----------------------------------------------------------------------------------------


def assert_listening_changes_nothing(case: Case, model: Any, plain: Tensor) -> None:
    patched = cached(model, "F" * STEPS)
    assert torch.equal(sample(case, patched), plain)
    assert kinds(patched) == "F" * STEPS and not report_of(patched).notices


def assert_skips_repeat(case: Case, model: Any, plain: Tensor, plan: str = PLAN, last: Any = None) -> None:
    """What the last block gave, found without being told where it is; bytes as predicted."""
    patched = cached(model, plan)
    result = sample(case, patched)
    report = report_of(patched)
    assert kinds(patched) == plan and not report.notices and report.place.startswith("found and proved")
    assert torch.equal(result, repeated(case, model, plan, last)) and not torch.equal(result, plain)
    assert report.peak_bytes == report.predicted_bytes > 0


def assert_calibrated_at_full_rank(case: Case, model: Any, plain: Tensor, plan: str = "FiiFiiFi", atol: float = 2e-4) -> None:
    patched = cached(model, plan, factors=full_rank(case, model))
    result = sample(case, patched)
    assert kinds(patched) == plan and not report_of(patched).notices
    torch.testing.assert_close(result, plain, atol=atol, rtol=10 * atol)


def assert_right(case: Case, model: Any, last: Any = None, calibrates: bool = True) -> Tensor:
    """All of this. calibrates: whether there are calibrated evaluations. Returns what is sampled without a cache."""
    plain = sample(case, model)
    assert torch.isfinite(plain).all() and plain.std() > 0.05, "a model that says nothing tests nothing"
    assert_listening_changes_nothing(case, model, plain)
    assert_skips_repeat(case, model, plain, last=last)
    if calibrates:
        assert_calibrated_at_full_rank(case, model, plain)
    return plain

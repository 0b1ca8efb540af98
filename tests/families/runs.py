"""Samples a model with and without a cache, and returns what a run found out."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.utils
import torch
from comfy.nested_tensor import NestedTensor
from comfyui_duca.cache_core import Plan, RunReport, find_family
from comfyui_duca.cache_core.discovery.places import Known
from comfyui_duca.cache_core.engine.linear_sites import Factors, LinearSite, linear_sites
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.predictors import Predictor, Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from making import Case

STEPS = 8  # with fewer steps there is a notice, which tests would have to expect
PLAN = "FaFaFaFa"


def network(model: Any) -> torch.nn.Module:
    return model.model.diffusion_model


def sample(case: Case, model: Any, steps: int = STEPS, **more: Any) -> torch.Tensor:
    """Samples a latent, or several that are then packed one after the other."""
    parts = isinstance(case.latent[0], tuple)
    latent = NestedTensor([torch.zeros(1, *shape) for shape in case.latent]) if parts else torch.zeros(1, *case.latent)
    noise = comfy.sample.prepare_noise(latent, 5)
    conds = case.cond(1), case.cond(2)
    result = comfy.sample.sample(model, noise, steps, case.cfg, "euler", "simple", *conds, latent, seed=5, disable_pbar=True, **more)
    return comfy.utils.pack_latents(result.unbind())[0] if parts else result


def cached(model: Any, plan: str, predictor: Predictor = Reuse(), share: float = 0.1, factors: Factors | None = None) -> Any:
    """Returns the model with a cache that follows this plan. `share`: of tokens that a conservative evaluation computes."""
    return host.attach(model, Strategy(Given(Plan.parse(plan)), predictor, token_share=share, factors=factors))


def report_of(patched: Any) -> RunReport:
    return host.book_of(patched).last


def kinds(patched: Any) -> str:
    """Returns the kinds of the last run's evaluations, written as a plan is."""
    return "".join(evaluation.kind.value for evaluation in report_of(patched).evaluations)


def cached_run(case: Case, model: Any, plan: str = PLAN) -> RunReport:
    patched = cached(model, plan)
    sample(case, patched)
    return report_of(patched)


def known_of(case: Case, model: Any) -> Known:
    """Returns what a run finds out about the model's calls, in which cond and uncond are as the host puts them."""
    patched = cached(model, "FF")
    sample(case, patched, 2)
    return report_of(patched).shape.known


def kept_of(report: RunReport) -> list[tuple[int, int]]:
    """Returns tokens and channels of what is kept of one batch row, a pair for each kept tensor."""
    known = report.shape.known
    return [(kept.rows_and_tokens // known.rows, kept.shape[-1]) for kept in known.place.kept]


def kept_tokens(report: RunReport) -> list[int]:
    return [tokens for tokens, _channels in kept_of(report)]


def sites_of(model: Any, known: Known) -> list[LinearSite]:
    return linear_sites(find_family(network(model)), known.layer_calls, network(model))


def layers_of(case: Case, model: Any) -> list[LinearSite]:
    """Returns the linear layers that get tokens, as a run finds them."""
    return sites_of(model, known_of(case, model))


def input_channels(model: Any) -> int:
    """Returns the number of channels of the model's input tokens, which the embedding's weights take."""
    module = network(model).get_submodule(find_family(network(model)).embed)
    (weight,) = [weight for weight in module.parameters() if weight.ndim > 1]
    return weight[0].numel()

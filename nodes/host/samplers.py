"""Finds out how a sampler of the host changes a latent between evaluations, by running it on a few numbers.

A forecast is made from older latents. Noise that a sampler adds in between is not in them, so it would stay in the picture.
"""

from __future__ import annotations

import math
import warnings
from collections import OrderedDict
from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import comfy.k_diffusion.sampling
import torch
from torch import Tensor

_NUMBERS = 256  # values of the latent in a try; with so many, the share of noise is exact to a few percent of itself
_HARMLESS = 0.12  # share of noise per step: er_sde adds less in the second half and is fine, ancestral and SDE samplers 0.17 to 1
_KEPT = 64  # results that are remembered
_START = 20_000  # seed of the first latent; samplers get another, as their noise must be other numbers
_MOST = 20  # evaluations per step, after which the sampler is taken to be endless with the stand-in's answers
_known: OrderedDict[tuple, tuple[Any, float | None]] = OrderedDict()


def is_euler(sampler: Any) -> bool:
    """Returns whether it is the host's Euler sampler (which DDIM is too) and adds no noise between steps."""
    function = getattr(sampler, "sampler_function", None)
    return function is comfy.k_diffusion.sampling.sample_euler and not sampler.extra_options.get("s_churn")


def adds_noise(sampling: Any, sampler: Any, sigmas: Tensor) -> bool | None:
    """Returns whether a sampler adds so much noise that forecasts would leave it in the picture. None if it cannot be tried.

    Args:
        sampling: The model's `model_sampling`, as some samplers step differently for other kinds of model.
        sampler: The host's sampler object.
        sigmas: Noise levels (steps + 1,).
    """
    share = _remembered(sampling, sampler, sigmas)
    return None if share is None else share > _HARMLESS


def _remembered(sampling: Any, sampler: Any, sigmas: Tensor) -> float | None:
    function, options = getattr(sampler, "sampler_function", None), getattr(sampler, "extra_options", {})
    if function is None:
        return None

    def measure() -> list[float]:
        return fresh_noise(sampling, function, options, sigmas)

    if not all(value is None or isinstance(value, (str, bool, int, float)) for value in options.values()):
        return _tried(measure)  # an option may be a sampler, which can change, or be replaced at the same address
    key = (id(function), tuple(sorted(options.items())), tuple(sigmas.tolist()), type(sampling))
    if key not in _known:
        _known[key] = function, _tried(measure)  # with the function, so that no other function gets its id
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    return _known[key][1]


def _tried(measure: Callable[[], list[float]]) -> float | None:
    """Returns the largest share of noise in the second half of the steps, in which what is left in the latent becomes the picture.

    None where a sampler needs more of a model than the stand-in has, or gives NaN.
    """
    try:
        shares = measure()
    except Exception:  # other packs' samplers may need anything of a model
        return None
    second_half = shares[len(shares) // 2 :]
    return None if any(map(math.isnan, second_half)) else max(second_half, default=0.0)


@torch.inference_mode()
def fresh_noise(sampling: Any, function: Callable[..., Any], extra_options: dict[str, Any], sigmas: Tensor) -> list[float]:
    """Runs a sampler on `_NUMBERS` numbers, with a model that answers 0 to everything, so that only noise is left.

    Returns:
        For the latent at every evaluation but the first, the share 0..1 of its variance that does not come from the latent before.
    """
    latents: list[Tensor] = []

    def model(x: Tensor, sigma: Tensor, model_options: dict[str, Any] | None = None, **_more: Any) -> Tensor:
        latents.append(x.detach().double().flatten().clone())
        if len(latents) > _MOST * len(sigmas):
            raise RecursionError("the sampler does not come to an end")
        answer = torch.zeros_like(x)
        for hook in (model_options or {}).get("sampler_post_cfg_function", ()):  # CFG++ samplers get the unguided answer in this way
            hook({"denoised": answer, "cond_denoised": answer, "uncond_denoised": answer, "sigma": sigma, "input": x})
        return answer

    patcher = SimpleNamespace(get_model_object={"model_sampling": sampling}.__getitem__)
    inner = SimpleNamespace(model_sampling=sampling)
    model.inner_model = SimpleNamespace(inner_model=inner, model_patcher=patcher, model_options={})  # type: ignore[attr-defined]
    levels = sigmas.detach().float().cpu()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():  # the picture's own noise must not change
        warnings.simplefilter("ignore")
        torch.default_generator.manual_seed(_START)  # torch.manual_seed would seed every device
        start = torch.randn(1, 1, 1, _NUMBERS) * levels[0]
        function(model, start, levels, extra_args={"model_options": {}, "seed": 0}, callback=None, disable=True, **extra_options)
    return [_unexplained(before, after) for before, after in pairwise(latents)]


def _unexplained(before: Tensor, after: Tensor) -> float:
    """Returns the share of the sum of squares of `after` that no multiple of `before` explains."""
    rest = after - before * (before @ after) / (before @ before)
    return float(rest @ rest / (after @ after))

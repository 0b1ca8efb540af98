"""Finds out what a sampler of the host does to a latent between evaluations, by running it on a few numbers.

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

_NUMBERS = 256  # tried at once; the share of noise among so many is known to a few hundredths of itself
_HARMLESS = 0.12  # share of noise per step: er_sde adds less in the second half and is fine, ancestral and SDE samplers 0.17 to 1
_KEPT = 64
_START = 20_000  # seed of the first latent; another than samplers are given, whose noise must not be the same numbers
_MOST = 20  # evaluations a step, before a sampler is taken for one that does not end on the stand-in's answers
_known: OrderedDict[tuple, tuple[Any, float | None]] = OrderedDict()


def is_euler(sampler: Any) -> bool:
    """Whether it is the host's Euler sampler (DDIM is the same one there) and adds no noise between steps."""
    function = getattr(sampler, "sampler_function", None)
    return function is comfy.k_diffusion.sampling.sample_euler and not sampler.extra_options.get("s_churn")


def adds_noise(sampling: Any, sampler: Any, sigmas: Tensor) -> bool | None:
    """Whether the sampler adds so much noise at these noise levels (n+1,) that a forecast would leave it in; None if it cannot be tried.

    sampling: the model's `model_sampling`, as some samplers step differently for other kinds of model.
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
        return _tried(measure)  # a sampler inside another may change, and be another at the same address
    key = (id(function), tuple(sorted(options.items())), tuple(sigmas.tolist()), type(sampling))
    if key not in _known:
        _known[key] = function, _tried(measure)  # with the function, so that its number stays its own
        while len(_known) > _KEPT:
            _known.popitem(last=False)
    return _known[key][1]


def _tried(measure: Callable[[], list[float]]) -> float | None:
    """The most noise of any step in the second half, where the picture is made out of what is left; None where a sampler asks the
    stand-in for more than it has, or gives no numbers."""
    try:
        shares = measure()
    except Exception:  # other packs' samplers may need anything of a model
        return None
    second_half = shares[len(shares) // 2 :]
    return None if any(map(math.isnan, second_half)) else max(second_half, default=0.0)


@torch.inference_mode()
def fresh_noise(sampling: Any, function: Callable[..., Any], extra_options: dict[str, Any], sigmas: Tensor) -> list[float]:
    """Of the latent at every evaluation but the first, the share (0..1, of its variance) that does not come from the one before.

    The sampler runs on `_NUMBERS` numbers, with a model that answers 0 to everything: what is left is the noise alone.
    """
    latents: list[Tensor] = []

    def model(x: Tensor, sigma: Tensor, model_options: dict[str, Any] | None = None, **_more: Any) -> Tensor:
        latents.append(x.detach().double().flatten().clone())
        if len(latents) > _MOST * len(sigmas):
            raise RecursionError("the sampler does not come to an end")
        answer = torch.zeros_like(x)
        for told in (model_options or {}).get("sampler_post_cfg_function", ()):  # CFG++ samplers ask for the unguided answer in this way
            told({"denoised": answer, "cond_denoised": answer, "uncond_denoised": answer, "sigma": sigma, "input": x})
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
    """Share of `after`'s sum of squares that no multiple of `before` explains."""
    rest = after - before * (before @ after) / (before @ before)
    return float(rest @ rest / (after @ after))

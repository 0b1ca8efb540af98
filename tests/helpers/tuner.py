"""Small calibrations and recorded runs of the demo model, for the tests of cache_core.tuning."""

from __future__ import annotations

import torch
from comfyui_duca.cache_core.tuning import Calibrator, Wishes
from comfyui_duca.cache_core.tuning.tape import TapedRun
from comfyui_duca.nodes import host

from helpers.sampling import sample

STEPS = 6
PROMPTS = ("red apple", "castle")
QUICK = Wishes(speedups=(1.5, 2.5), directions=32)


def drawn(model, prompt: int, **more) -> torch.Tensor:
    """What every run of a prompt begins with, so that all end alike."""
    return sample(model, **{"prompt": PROMPTS[prompt], "seed": 100 + prompt, "steps": STEPS, "size": (24, 24), **more})


def sampler_of(model, **more):
    """What a Calibrator is given. more: of `sample`; a list has one for each prompt."""

    def sampled(prompt, make):
        clone = model.clone()

        def open_run(patcher, sigmas, sampler):
            return make(host.run_start(patcher, sigmas, sampler))

        host.listen(clone, open_run, lambda run, result: run.close(result is not None))
        return drawn(clone, prompt, **{name: value[prompt] if isinstance(value, list) else value for name, value in more.items()})

    return sampled


def calibrator(model, wishes=QUICK, on_progress=lambda *_: None, prompts=range(len(PROMPTS)), **more) -> Calibrator:
    sampled = sampler_of(model, **more)
    return Calibrator(lambda number, make: sampled(prompts[number], make), len(prompts), wishes, on_progress)


def taped(model, strategy, before=None, until=0, **more):
    """The latent of the first prompt and its run."""
    runs = []

    def make(opening):
        runs.append(TapedRun(strategy, opening, before, until))
        return runs[-1]

    return sampler_of(model, **more)(0, make), runs[-1]

"""Runs the host's own sampler for a calibration, and tells the user how far it is."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.model_management
import comfy.sample
import comfy.utils
import comfyui_version
import torch
from comfy.model_patcher import ModelPatcher

from ..cache_core import CacheRun, Opening, find_family
from ..cache_core.calibration.calibration import Calibration
from ..cache_core.calibration.sidecar import About
from ..cache_core.tuning import Calibrator, Learned, Wishes
from . import host, notices, sidecars

_VERSION = "0.1.0"
_SHARES = (("recording", 0.1), ("measuring sensitivity", 0.2), ("trying out", 0.6), ("factorising layers", 0.1))
_STEPS = 1000  # of the progress bar


@dataclass(frozen=True)
class Sampling:
    """What is sampled, and how: what a KSampler would be given. positives, negatives: one conditioning per prompt.

    latent: (1, …), where sampling starts from, usually empty, in the model's channels. Prompt number k is sampled with seed + k.
    """

    positives: Sequence[Any]
    negatives: Sequence[Any]
    latent: torch.Tensor
    sampler: str
    scheduler: str
    steps: int
    guidance: float
    seed: int

    def run(self, model: ModelPatcher, prompt: int) -> torch.Tensor:
        """The latent that the host's sampler ends in."""
        noise = comfy.sample.prepare_noise(self.latent, self.seed + prompt)
        return comfy.sample.sample(
            model, noise, self.steps, self.guidance, self.sampler, self.scheduler, self.positives[prompt], self.negatives[prompt],
            self.latent, disable_pbar=True, seed=self.seed + prompt,
        )  # fmt: skip


def calibrate(model: ModelPatcher, sampling: Sampling, wishes: Wishes, name: str, node_id: str | None = None) -> Calibration:
    """Samples `model` as often as needed and returns what was learned; writes nothing. A cancel ends it at once.

    Raises ValueError, in words for the user, for a model that cannot be calibrated.
    """
    plain = host.detach(model)
    network = plain.model.diffusion_model
    if host.is_unet(model):
        raise ValueError(f"SVD Calibrator is for diffusion transformers; {type(network).__name__} is a UNet")
    family = find_family(network)
    fingerprint = sidecars.fingerprint_of(model)  # first, as there may be none
    sigmas: list[list[float]] = []

    def sample(prompt: int, make: Callable[[Opening], CacheRun]) -> torch.Tensor:
        listening = plain.clone()

        def open_run(patcher: ModelPatcher, levels: torch.Tensor, sampler: Any) -> CacheRun:
            sigmas.append(levels.tolist())
            return make(host.opening(patcher, levels, sampler))

        host.listen(listening, open_run, lambda run, result: run.close(result is not None))
        return sampling.run(listening, prompt).float().cpu()

    progress = _Progress(wishes, node_id)
    learned = Calibrator(sample, len(sampling.positives), wishes, progress).run()
    about = _about(family.name, name, sampling, wishes, learned, sigmas[0])
    return Calibration(about, fingerprint, learned.forecast, learned.factors)


def _about(family: str, name: str, sampling: Sampling, wishes: Wishes, learned: Learned, sigmas: list[float]) -> About:
    return About(
        family=family,
        model_name=name or family,
        sampler=sampling.sampler,
        scheduler=sampling.scheduler,
        steps=learned.steps,
        guidance=sampling.guidance,
        sigmas=tuple(sigmas),
        times=learned.times,
        token_grid=tuple(sampling.latent.shape[2:]),
        prompt_count=len(sampling.positives),
        seeds=tuple(sampling.seed + prompt for prompt in range(len(sampling.positives))),
        rank=wishes.rank if wishes.method else 0,
        method=wishes.method,
        versions={"pack": _VERSION, "torch": torch.__version__, "comfyui": comfyui_version.__version__},
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    )


class _Progress:
    """One bar over all stages, with the stage's name under the node. Raises the host's own exception after a cancel."""

    def __init__(self, wishes: Wishes, node_id: str | None) -> None:
        wanted = {
            "recording": True,
            "measuring sensitivity": wishes.forecast,
            "trying out": wishes.forecast,
            "factorising layers": wishes.method,
        }
        shares = {stage: share for stage, share in _SHARES if wanted[stage]}
        self._shares = {stage: share / sum(shares.values()) for stage, share in shares.items()}
        self._bar = comfy.utils.ProgressBar(_STEPS, node_id)
        self._node_id, self._shown = node_id, ""

    def __call__(self, stage: str, done: int, total: int) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        before = sum(share for other, share in list(self._shares.items())[: list(self._shares).index(stage)])
        self._bar.update_absolute(round(_STEPS * (before + self._shares[stage] * done / max(total, 1))))
        text = f"{stage} {done} of {total}"
        if text != self._shown:
            self._shown = text
            notices.show(text, self._node_id)

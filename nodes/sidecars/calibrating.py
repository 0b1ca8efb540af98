"""Calibrates a MODEL: samples it with the host's own sampler as often as `Calibrator` asks, and shows the progress."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import comfyui_version
import torch
from comfy.model_patcher import ModelPatcher

from ...cache_core import CacheRun, RunStart, find_family
from ...cache_core.calibration.calibration import Calibration
from ...cache_core.calibration.sidecar import About
from ...cache_core.tuning import Calibrator, Learned, Wishes
from .. import host
from ..host.ksampler import ksample
from ..page.progress import StagedProgress
from .fingerprints import fingerprint_of

_VERSION = "0.1.0"


@dataclass(frozen=True)
class Sampling:
    """The prompts and how they are sampled, as inputs of a KSampler.

    Args:
        positives, negatives: One conditioning per prompt.
        latent: (1, …), usually empty, in the model's channels. Sampling starts from it.
        sampler, scheduler: Names of the host.
        steps: Number of steps.
        guidance: The cfg.
        seed: Seed of prompt 0. Prompt k has `seed + k`.
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
        """Samples a prompt, given by its number, and returns the final latent."""
        return ksample(
            model, self.positives[prompt], self.negatives[prompt], {"samples": self.latent}, seed=self.seed + prompt, steps=self.steps,
            cfg=self.guidance, sampler_name=self.sampler, scheduler=self.scheduler,
        )  # fmt: skip


def calibrate(model: ModelPatcher, sampling: Sampling, wishes: Wishes, name: str, node_id: str | None = None) -> Calibration:
    """Samples `model` as often as needed and returns the calibration. It writes no file. A cancel ends it at once.

    Args:
        model: The model.
        sampling: The prompts and how they are sampled.
        wishes: What the calibration is to have.
        name: Name of the model in the calibration. If empty, that of its family.
        node_id: The node under which progress is shown.

    Raises:
        ValueError: For a model that cannot be calibrated, with a message for the user.
    """
    host.check_transformer(model, "SVD Calibrator")
    plain = host.detach(model)
    family = find_family(plain.model.diffusion_model)
    fingerprint = fingerprint_of(model)  # before the samplings, as it may fail
    sigmas: list[list[float]] = []

    def sample(prompt: int, make: Callable[[RunStart], CacheRun]) -> torch.Tensor:
        listening = plain.clone()

        def open_run(patcher: ModelPatcher, levels: torch.Tensor, sampler: Any) -> CacheRun:
            sigmas.append(levels.tolist())
            return make(host.run_start(patcher, levels, sampler))

        host.listen(listening, open_run, lambda run, result: run.close(result is not None))
        return sampling.run(listening, prompt).float()

    progress = StagedProgress(_expected_times(wishes), node_id)

    def on_progress(stage: str, done: int, total: int) -> None:
        progress.show(stage, done, total, f"{stage} {done} of {total}")

    learned = Calibrator(sample, len(sampling.positives), wishes, on_progress).run()
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


def _expected_times(wishes: Wishes) -> dict[str, float]:
    """Returns the expected time of each stage of `Calibrator`, relative to the others."""
    stages = (
        ("recording", 0.1, True),
        ("measuring sensitivity", 0.2, wishes.forecast),
        ("trying out", 0.6, wishes.forecast),
        ("factorising layers", 0.1, bool(wishes.method)),
    )
    return {stage: time for stage, time, is_wanted in stages if is_wanted}

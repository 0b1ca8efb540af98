"""Samples the pictures that Cache Sweep compares: one prompt, without a cache and at several speed-ups."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from comfy.model_patcher import ModelPatcher

from ...cache_core import Settings
from .. import host
from ..host.ksampler import decoded, ksample
from ..page.progress import StagedProgress
from .comparison import Row

_WARM_UP_STEPS = 2  # the fewest that all schedulers can make
_DECODING = 0.05 / 0.95  # expected time of decoding, as a share of the time of all samplings
_OnStep = Callable[[int, int], None]  # see `ksample`


@dataclass(frozen=True)
class Run:
    """One sampling to compare.

    Args:
        label: Name in the table.
        steps: Number of steps.
        speedup: Speed-up of its cache, None for a run without one.
    """

    label: str
    steps: int
    speedup: float | None = None

    @property
    def expected_time(self) -> float:
        """The time that it should take, in steps without a cache."""
        return self.steps / (self.speedup or 1)


@dataclass(frozen=True)
class _Sampled:
    """The result of one sampling.

    Args:
        latent: The final latent, a tensor or several as one.
        seconds: Time that the sampling took.
        compute: Multiply-adds of the run in full, divided by those done. None without a cache.
    """

    latent: Any
    seconds: float
    compute: float | None


def in_fewer_steps(run: Run) -> Run:
    """Returns the run without a cache that should take as long."""
    steps = max(1, round(run.expected_time))
    return Run(f"no cache, {steps} steps", steps)


def draw(model: ModelPatcher, vae: Any, mode: str, runs: Sequence[Run], inputs: Mapping[str, Any], node_id: str | None) -> dict[Run, Row]:
    """Samples and decodes all runs.

    Args:
        model: The model. A cache of ours on it is removed.
        vae: The host's VAE.
        mode: Mode of the caches.
        runs: What to sample. Time and compute of all are measured against the first.
        inputs: Inputs of `ksample`, without the steps.
        node_id: The node under which progress is shown.

    Returns:
        The pictures of each run, with time and compute.

    Raises:
        ValueError: For a model that cannot be cached. After a cancel the host's own exception is raised.
    """
    plain = host.detach(model)
    host.check_transformer(plain, "Cache Sweep")
    # The first sampling loads the model and takes its fingerprint, which would make the uncached run look slow.
    warm_up = Run("warming up", _WARM_UP_STEPS, 1.0)
    samplings = [warm_up, *runs]
    expected: dict[Run | str, float] = {run: run.expected_time for run in samplings}
    progress = StagedProgress(expected | {"decoding": _DECODING * sum(expected.values())}, node_id)
    sampled = {}
    for number, run in enumerate(samplings):
        name = f"{run.label} ({number} of {len(runs)})" if number else run.label
        sampled[run] = _sample(plain, mode, run, inputs, _shown(progress, run, name))
    rows = {}  # decoded after all are sampled: on a small GPU the VAE takes the model's place, and loading it again would be timed
    for done, run in enumerate(runs):
        progress.show("decoding", done, len(runs), f"decoding {done} of {len(runs)}")
        rows[run] = _row(run, sampled[run], runs[0], sampled[runs[0]], decoded(vae, sampled[run].latent))
    progress.show("decoding", len(runs), len(runs), f"decoding {len(runs)} of {len(runs)}")
    return rows


def _shown(progress: StagedProgress, run: Run, name: str) -> _OnStep:
    return lambda done, total: progress.show(run, done, total, f"{name}: step {done} of {total}")


def _row(run: Run, own: _Sampled, reference: Run, whole: _Sampled, pictures: torch.Tensor) -> Row:
    compute = own.compute if run.speedup is not None else reference.steps / run.steps
    stood_aside = run.speedup is not None and own.compute is None
    return Row(f"{run.label} (cache not used)" if stood_aside else run.label, pictures, whole.seconds / own.seconds, compute)


def _sample(plain: ModelPatcher, mode: str, run: Run, inputs: Mapping[str, Any], on_step: _OnStep) -> _Sampled:
    model = plain
    if run.speedup is not None:
        model = host.attach(plain, Settings(mode=mode, speedup=run.speedup))
    on_step(0, run.steps)
    began = time.perf_counter()
    result = ksample(model, steps=run.steps, on_step=on_step, **inputs)
    seconds = time.perf_counter() - began
    book = host.book_of(model)
    return _Sampled(result, seconds, book.last.compute_speedup if book is not None and book.last is not None else None)

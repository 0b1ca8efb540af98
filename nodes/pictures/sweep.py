"""Draws the pictures that Cache Sweep compares: one prompt, without a cache and with caches of several speed-ups."""

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

_WARM_UP_STEPS = 2  # some schedulers cannot make fewer
_DECODING = 0.05 / 0.95  # of the time that all samplings take
_OnStep = Callable[[int, int], None]  # as of `ksample`


@dataclass(frozen=True)
class Run:
    """One sampling. speedup: of its cache; None samples without one."""

    label: str
    steps: int
    speedup: float | None = None

    @property
    def expected_time(self) -> float:
        """In steps without a cache."""
        return self.steps / (self.speedup or 1)


@dataclass(frozen=True)
class _Sampled:
    """latent: what the sampler ended in, a tensor or several as one. seconds: it took.

    compute: so many times less than in full, as counted; None: no cache.
    """

    latent: Any
    seconds: float
    compute: float | None


def in_fewer_steps(run: Run) -> Run:
    """What takes as long without a cache."""
    steps = max(1, round(run.expected_time))
    return Run(f"no cache, {steps} steps", steps)


def draw(model: ModelPatcher, vae: Any, mode: str, runs: Sequence[Run], inputs: Mapping[str, Any], node_id: str | None) -> dict[Run, Row]:
    """What each run gave, against the first one.

    mode: of the caches. inputs: of `ksample`, without the steps. node_id: the node under which the progress is shown.

    Raises ValueError for a model that cannot be cached, and the host's own exception after a cancel.
    """
    plain = host.detach(model)
    host.check_transformer(plain, "Cache Sweep")
    # What only the first sampling does (loading the model, knowing it by its weights) would else make the uncached run look slow.
    warm_up = Run("warming up", _WARM_UP_STEPS, 1.0)
    samplings = [warm_up, *runs]
    expected: dict[Run | str, float] = {run: run.expected_time for run in samplings}
    progress = StagedProgress(expected | {"decoding": _DECODING * sum(expected.values())}, node_id)
    sampled = {}
    for number, run in enumerate(samplings):
        name = f"{run.label} ({number} of {len(runs)})" if number else run.label
        sampled[run] = _sample(plain, mode, run, inputs, _shown(progress, run, name))
    rows = {}  # decoded after all are sampled: on a small GPU the VAE drives the model out, and loading it again would be timed
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
    return Row(f"{run.label} (stood aside)" if stood_aside else run.label, pictures, whole.seconds / own.seconds, compute)


def _sample(plain: ModelPatcher, mode: str, run: Run, inputs: Mapping[str, Any], on_step: _OnStep) -> _Sampled:
    model = plain
    if run.speedup is not None:
        model = host.attach(plain, Settings(mode=mode, speedup=run.speedup))
    on_step(0, run.steps)
    begun = time.perf_counter()
    result = ksample(model, steps=run.steps, on_step=on_step, **inputs)
    seconds = time.perf_counter() - begun
    book = host.book_of(model)
    return _Sampled(result, seconds, book.last.compute_speedup if book is not None and book.last is not None else None)

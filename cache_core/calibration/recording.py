"""Listens to whole sampling runs and adds their trajectories to the statistics. Nothing is skipped and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from ..engine import EngineCall, TokenChoice, listening
from ..families import ModelFamily
from .statistics import Moments


class _Trace:
    """One cond's trajectory: input and hidden state of the same tokens at every evaluation, on the CPU."""

    def __init__(self, kept_tokens: int, seed: int) -> None:
        self.inputs: list[Tensor] = []
        self.hidden: list[Tensor] = []
        self._kept, self._seed = kept_tokens, seed
        self._chosen: Tensor | None = None

    def remember_hidden(self, time: float, hidden: Tensor, tokens: Tensor | None = None) -> None:
        """hidden (rows, L, C) and tokens (rows, L, d) of one evaluation."""
        assert tokens is not None
        total = hidden.shape[0] * hidden.shape[1]
        if self._chosen is None:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(self._seed))
            self._chosen = order[: self._kept].to(hidden.device)
        self.hidden.append(hidden.flatten(0, 1)[self._chosen].float().cpu())
        self.inputs.append(tokens.flatten(0, 1)[self._chosen].float().cpu())


class Recording:
    """Stands where a `CacheRun` stands, for one sampling run.

    moments: gets one trajectory per cond when the run is complete. kept_tokens: of each cond, chosen at random; fewer take less
    memory (n · kept_tokens · C floats of system memory per cond while the run lasts).
    """

    def __init__(self, family: ModelFamily, moments: Moments, kept_tokens: int = 4096, seed: int = 0) -> None:
        if not family.embed:
            raise ValueError(f"{family.name} models have no calibrated forecast")
        self._family, self._moments, self._kept, self._seed = family, moments, kept_tokens, seed
        self._traces: dict[Hashable, _Trace] = {}
        self._passes = 0
        self.sigmas: list[float] = []

    @contextmanager
    def evaluation(self, sigma: float) -> Iterator[None]:
        self._passes = 0
        self.sigmas.append(sigma)
        yield

    def cond_batch(self) -> None:
        self._passes += 1

    def model_call(self, call: Any, compute: Callable[[], Tensor]) -> Tensor:
        if call.bypass or self._passes > 1:
            return compute()
        traces: list[Any] = [self._traces.setdefault(cond, _Trace(self._kept, self._seed)) for cond in call.conds]
        engine = EngineCall(call.model, self._family, traces, 0.0, TokenChoice(0.0, 0), False, True, _ignore)
        with listening(engine):
            return compute()

    def close(self, is_complete: bool = False) -> int:
        """Adds what was recorded, if the run is complete; returns the number of evaluations. Conds that were absent
        from some evaluations are left out."""
        evaluations = len(self.sigmas)
        for trace in self._traces.values():
            if is_complete and len(trace.hidden) == evaluations:
                self._moments.add(torch.stack(trace.inputs), torch.stack(trace.hidden))
        self._traces.clear()
        return evaluations


def _ignore(_call: EngineCall, _tokens: Tensor) -> None:
    """Nothing to do when a recorded call reaches its first block."""

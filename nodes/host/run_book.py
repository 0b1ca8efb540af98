"""Keeps the reports of a cached model's last runs, so that a node can find the run that made its latent."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ...cache_core import RunReport

_KEPT = 8  # runs: enough for two samplers on one model, or a few batches


class Entry(NamedTuple):
    """A finished run.

    Args:
        mark: Identifies the final latent. None if the run gave none that is known.
        report: The report.
    """

    mark: tuple | None
    report: RunReport


class RunBook:
    """Keeps the last reports. It holds plain numbers only. Clones of a model share it, as ComfyUI copies attachments by reference."""

    def __init__(self) -> None:
        self._entries: list[Entry] = []

    def add(self, report: RunReport, result: torch.Tensor | None) -> None:
        self._entries = [*self._entries, Entry(_mark(result), report)][-_KEPT:]

    @property
    def last(self) -> RunReport | None:
        return self._entries[-1].report if self._entries else None

    def report_of(self, latent: torch.Tensor) -> RunReport | None:
        """Returns the report of the latest run that gave this latent, or None."""
        mark = _mark(latent)
        return next((entry.report for entry in reversed(self._entries) if entry.mark == mark), None)

    def is_foreign(self, latent: torch.Tensor) -> bool:
        """Returns whether none of these runs gave this latent. False where that is not known, as in a run under another model's guider."""
        is_known = self._entries and self._entries[-1].mark is not None and _mark(latent) is not None
        return bool(is_known) and self.report_of(latent) is None


def _mark(latent: torch.Tensor | None) -> tuple | None:
    """Returns shape and a few values of a latent, which identify it on any device. None without one, or for several tensors."""
    if latent is None or latent.is_nested or not latent.numel():
        return None
    flat = latent.detach().flatten()
    picked = flat[:: max(1, flat.numel() // 16)][:16]
    return tuple(latent.shape), tuple(picked.float().tolist())

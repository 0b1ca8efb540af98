"""Finds which sidecar belongs to a loaded model: the one of its checkpoint, whatever the dtype, the host and the LoRAs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from comfy.model_patcher import ModelPatcher

from ...cache_core import find_family
from ...cache_core.calibration.sidecar import About, Contents, SidecarError, peek
from .fingerprints import all_fingerprints_of
from .folder import candidates, state_of

Refused = Callable[[Path, str], None]  # is called with a file that cannot be used, and with why and what to do


class Found(NamedTuple):
    """A sidecar, and what it says of itself."""

    path: Path
    about: About


def find(model: ModelPatcher, refused: Refused = lambda path, reason: None) -> Found | None:
    """The most recently created sidecar of the model's checkpoint, or None; of two equally old the later written, then by path.

    refused: called for every file that should be a sidecar and cannot be read, at each search; none of them ends the search.
    Without a sidecar of the model's family the weights are not looked at, so this costs next to nothing.
    Raises ValueError as `fingerprint_of` does.
    """
    family = find_family(model.model.diffusion_model)
    seen = [(path, mtime, said) for path, mtime, said in _files.all_of(candidates(), refused) if said.about.family == family.name]
    if not seen:
        return None
    fingerprints = all_fingerprints_of(model)
    for path, _, said in sorted(seen, key=lambda at: (at[2].about.created, at[1], str(at[0])), reverse=True):
        if fingerprints.include(said.fingerprint):
            return Found(path, said.about)
    return None


class _Files:
    """What files said of themselves when they were read before."""

    def __init__(self) -> None:
        self._read: dict[tuple[Path, int, int], Contents] = {}

    def all_of(self, paths: Iterable[Path], refused: Refused) -> list[tuple[Path, int, Contents]]:
        """Path, time of change and contents of all that can be read. Keeps no others: a right that was missing leaves no trace."""
        before, self._read = self._read, {}
        for path in paths:
            try:
                key = (path, *state_of(path))
                self._read[key] = before[key] if key in before else peek(path)
            except SidecarError as error:
                refused(path, reason_of(error))
            except OSError:  # it was there when the folder was listed
                continue
        return [(path, mtime, said) for (path, mtime, _), said in self._read.items()]


_files = _Files()


def reason_of(error: SidecarError) -> str:
    """What is wrong and what to do, without the file's path."""
    return f"{error.reason}; {error.remedy}"

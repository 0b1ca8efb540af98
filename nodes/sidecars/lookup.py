"""Finds the sidecar of a loaded model's checkpoint, whatever the dtype, the version of the host and the LoRAs on it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import NamedTuple

from comfy.model_patcher import ModelPatcher

from ...cache_core import find_family
from ...cache_core.calibration.sidecar import About, Contents, SidecarError, peek
from .fingerprints import all_fingerprints_of
from .folder import candidates, state_of

Refused = Callable[[Path, str], None]  # is called with a file that cannot be used, and with the reason and a remedy


class Found(NamedTuple):
    """A sidecar, and what it says about the calibration."""

    path: Path
    about: About


def find(model: ModelPatcher, refused: Refused = lambda path, reason: None) -> Found | None:
    """Returns the most recently created sidecar of the model's checkpoint, or None.

    Of two that are equally old it is the one that was written later, then the one with the later path. Without a sidecar of the model's
    family the weights are not read, so the search costs next to nothing.

    Args:
        model: The model.
        refused: Is called at each search with every file that should be a sidecar and cannot be read. The search goes on.

    Raises:
        ValueError: As `fingerprint_of` does.
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
    """Remembers the contents of files that were read before."""

    def __init__(self) -> None:
        self._read: dict[tuple[Path, int, int], Contents] = {}

    def all_of(self, paths: Iterable[Path], refused: Refused) -> list[tuple[Path, int, Contents]]:
        """Returns path, time of change and contents of all files that can be read.

        Only these are remembered, so that a file without permission is tried again.
        """
        before, self._read = self._read, {}
        for path in paths:
            try:
                key = (path, *state_of(path))
                self._read[key] = before[key] if key in before else peek(path)
            except SidecarError as error:
                refused(path, reason_of(error))
            except OSError:  # the file is gone since the folder was listed
                continue
        return [(path, mtime, said) for (path, mtime, _), said in self._read.items()]


_files = _Files()


def reason_of(error: SidecarError) -> str:
    """Returns the reason of an error and the remedy, without the path of the file."""
    return f"{error.reason}; {error.remedy}"

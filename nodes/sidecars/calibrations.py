"""Reads calibrations from sidecars, checks that they belong to a model, and finds the one of a model's checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from comfy.model_patcher import ModelPatcher

from ...cache_core import Settings
from ...cache_core.calibration.calibration import Calibration
from ...cache_core.calibration.sidecar import SidecarError, peek, read
from ..page.notices import say, show
from .fingerprints import belongs
from .folder import state_of
from .lookup import find, reason_of

_USED_SECTION = MappingProxyType({"auto": "forecast", "icc": "icc"})  # section of a calibration that each mode uses
SEARCHING_MODES = tuple(_USED_SECTION)


def used_sections(settings: Settings) -> tuple[str, ...]:
    """Returns the sections of a calibration that a run with these settings could use."""
    used = {_USED_SECTION.get(settings.mode)} - {None}
    if settings.schedule is not None and settings.mode != "off":
        used |= {"forecast"} if settings.schedule.needs_forecast else set()
        used |= {"icc"} if settings.schedule.needs_factors else set()
    return tuple(sorted(section for section in used if section is not None))


def load(path: Path, sections: tuple[str, ...] | None = None) -> Calibration:
    """Reads a calibration from a sidecar.

    Args:
        path: The sidecar.
        sections: The sections to read. None reads all.

    Raises:
        SidecarError: If the file cannot be read, is damaged or lacks a section.
        ValueError: For a plan that this version of the pack does not know, or whose first step is not full.
    """
    return _read(path, sections, state_of(path) if path.is_file() else None)  # for a missing file the reader raises the error


def sections_of(path: Path) -> tuple[str, ...]:
    """Returns which sections a sidecar has. Raises SidecarError."""
    return tuple(peek(path).tensors)


def check(calibration: Calibration, model: ModelPatcher) -> None:
    """Raises ValueError, with a message for the user, for a calibration of another checkpoint than the model's."""
    if not belongs(calibration.fingerprint, model):
        raise ValueError(
            f"the calibration {calibration.about.model_name!r} was made on another checkpoint than this model: "
            "connect the calibration of this checkpoint, or make one with SVD Calibrator"
        )


def calibration_of(model: ModelPatcher, section: str | None, refused: Callable[[str], None]) -> tuple[Path, Calibration] | None:
    """Returns the path and the calibration of the model's own sidecar. None where there is none, or where it lacks the section.

    It raises nothing: where a file cannot be read, sampling goes on without a calibration.

    Args:
        model: The model.
        section: The only section to read. None reads all.
        refused: Is called with a message for the user for each file that cannot be used.
    """
    try:
        found = find(model, lambda path, reason: refused(unusable(path, reason)))
    except ValueError as error:
        refused(f"no calibration is looked for: {error}")
        return None
    if found is None:
        return None
    try:
        if section is None:
            return found.path, load(found.path)
        return (found.path, load(found.path, (section,))) if section in sections_of(found.path) else None
    except (SidecarError, OSError, ValueError) as error:
        refused(unusable(found.path, error))
    return None


def unusable(path: Path, why: str | Exception) -> str:
    """Returns a message for the user that a file cannot be used. It names the file without its folder."""
    reason = reason_of(why) if isinstance(why, SidecarError) else getattr(why, "strerror", None) or why
    return f"the calibration {path.name} cannot be used: {reason}"


class CalibrationLookup:
    """Adds the checkpoint's own calibration to settings that have none and could use one.

    It is looked for at every sampling, as it may have been made since the last one.

    Args:
        settings: The settings.
        is_on: Whether to look for a calibration at all.
        node_id: The node under which notices are shown.

    Attributes:
        found: The file that was found for the last sampling, or None.
    """

    def __init__(self, settings: Settings, is_on: bool = True, node_id: str | None = None) -> None:
        self._settings, self._node_id = settings, node_id
        self._sections = used_sections(settings)
        self._is_on = is_on and settings.calibration is None and bool(self._sections)
        self._said: set[str] = set()
        self.found: Path | None = None

    def settings_for(self, patcher: ModelPatcher) -> Settings:
        """Returns the settings for a sampling of this model, with its calibration if one is found. Sets `found`."""
        section = self._sections[0] if len(self._sections) == 1 else None
        found = calibration_of(patcher, section, self._refused) if self._is_on else None
        self.found = found[0] if found is not None else None
        if found is None:
            return self._settings
        path, calibration = found
        logging.info("[DuCa] uses the calibration %s", path)
        show(f"uses the calibration {path.name}", self._node_id)
        return replace(self._settings, calibration=calibration)

    def _refused(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            say(f"DuCa Cache: {text}.", self._node_id)


@lru_cache(maxsize=1)  # consecutive samplings mostly use the same one, and it may be large
def _read(path: Path, sections: tuple[str, ...] | None, _state: tuple[int, int] | None) -> Calibration:
    return Calibration.from_sidecar(read(path, sections))

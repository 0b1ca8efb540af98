"""Reads the page's request for a plan, and checks every value in it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from comfy_api.latest import io
from torch import nn

from ...cache_core import Settings
from ...cache_core.calibration.sidecar import SidecarError
from ...cache_core.checks import check_count, check_number, check_one_of
from ...cache_core.planning.schedule import Schedule
from .. import sidecars
from ..cache_schedule import CacheSchedule
from ..duca_cache import DucaCache
from ..inputs.settings import schedule_of, settings_of
from ..sidecars import calibrations
from .live_runs import Known, live_runs

_MOST_STEPS = 1000
_MOST_LEVELS = 10_000  # noise levels, of which a denoise below 1 samples only the last ones
_USUAL_STEPS = 28


class Asked(NamedTuple):
    """A request that was checked.

    Args:
        settings: The settings that the node's inputs ask for.
        known: What is known of the node's last run, None before the first.
        calibration: The file that a Load Calibration names, or that the last run found. None if there is none.
        sampling: What the page found of the sampler, by the names of its inputs.
        steps: The steps that the sampler runs, out of all.
        total: Number of all steps. One of several samplers in a row runs only a part of them.
        is_assumed: Whether `total` is assumed, as the page found no number of steps.
    """

    settings: Settings
    known: Known | None
    calibration: Path | None
    sampling: Mapping[str, Any]
    steps: range
    total: int
    is_assumed: bool

    @property
    def network(self) -> nn.Module | None:
        """The network that the node's last run sampled, None if there is none any more."""
        return self.known.network() if self.known is not None else None


def read(body: Any) -> Asked:
    """Reads a request.

    Args:
        body: The request, as read from JSON.

    Raises:
        ValueError: With a message for the user. For the text of a schedule it is a ScheduleTextError.
    """
    if not isinstance(body, Mapping):
        raise ValueError("the request must be an object")
    node = body.get("node_id")
    known = live_runs.known_of(str(node)) if isinstance(node, (str, int)) else None
    path = _sidecar(body.get("calibration"), known)
    cache = _inputs(DucaCache, body.get("cache"))
    cache.pop("verbose")
    schedule = _schedule(body.get("schedule"))
    settings = settings_of(**cache, schedule=schedule)
    sections = calibrations.used_sections(settings)
    if path is not None and sections:
        try:
            available = tuple(section for section in sections if section in calibrations.sections_of(path))
            if available:
                settings = settings_of(**cache, schedule=schedule, calibration=calibrations.load(path, available))
        except (SidecarError, OSError, ValueError) as error:
            raise ValueError(calibrations.unusable(path, error)) from None
    given = body.get("sampling")
    sampling: Mapping[str, Any] = given if isinstance(given, Mapping) else {}
    total = _whole(sampling, "steps", _USUAL_STEPS)
    if not 1 <= total <= _MOST_STEPS:
        raise ValueError(f"steps must be a whole number from 1 to {_MOST_STEPS}")
    _check_denoise(sampling, total)
    stop = min(_whole(sampling, "end_at_step", total), total)
    start = _whole(sampling, "start_at_step", 0)
    if not 0 <= start < stop:
        raise ValueError(f"the sampler runs no step: from {start} to {stop} of {total}")
    return Asked(settings, known, path, sampling, range(start, stop), total, sampling.get("steps") is None)


def _whole(sampling: Mapping[str, Any], name: str, usual: int) -> int:
    value = sampling.get(name)
    if value is None:
        return usual
    check_count(name, value)
    return value


def _check_denoise(sampling: Mapping[str, Any], steps: int) -> None:
    """Refuses a `denoise` that makes too many noise levels: the host works out steps / denoise of them and runs the last `steps`."""
    denoise = sampling.get("denoise")
    if denoise is None:
        return
    check_number("denoise", denoise, 0)
    if denoise and steps / denoise > _MOST_LEVELS:
        raise ValueError(f"{steps} steps with a denoise of {denoise:g} need more than {_MOST_LEVELS} noise levels: use a higher denoise")


def _schedule(given: Any) -> Schedule | None:
    return schedule_of(**_inputs(CacheSchedule, given)) if given is not None else None


def _inputs(node: type[io.ComfyNode], given: Any) -> dict[str, Any]:
    """Returns the values of all plain inputs of a node, by name: the given ones, checked for type and range, or the defaults."""
    if given is not None and not isinstance(given, Mapping):
        raise ValueError(f"the inputs of {node.define_schema().display_name} must be an object")
    values = {}
    for field in _fields(node):  # type: ignore[arg-type]
        value = (given or {}).get(field.id, field.default)
        values[field.id] = _checked(field, value)
    return values


@lru_cache(maxsize=8)
def _fields(node: type[io.ComfyNode]) -> tuple[Any, ...]:
    plain = (io.Combo.Input, io.Float.Input, io.Int.Input, io.String.Input, io.Boolean.Input)
    return tuple(field for field in node.define_schema().inputs if isinstance(field, plain))


def _checked(field: Any, value: Any) -> Any:
    if isinstance(field, io.Combo.Input):
        check_one_of(field.id, value, field.options)
    elif isinstance(field, (io.Float.Input, io.Int.Input)):
        check_number(field.id, value, field.min, field.max)
        return int(value) if isinstance(field, io.Int.Input) else float(value)
    elif not isinstance(value, bool if isinstance(field, io.Boolean.Input) else str):
        raise ValueError(f"{field.id} must be {'true or false' if isinstance(field, io.Boolean.Input) else 'a text'}")
    return value


def _sidecar(name: Any, known: Known | None) -> Path | None:
    """Returns the file that a Load Calibration names, or the one that the last run found. No name leads out of the folders."""
    if name is None:
        return known.calibration if known is not None else None
    if not isinstance(name, str) or name not in sidecars.names():
        raise ValueError("there is no such calibration")
    try:
        return sidecars.path_of(name)
    except FileNotFoundError:
        raise ValueError(f"the calibration {name} cannot be used: it is a link to a file that is not there") from None

"""Puts a cache on a MODEL. Every sampling of it then gets a run, is shown on the page, and leaves a report."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher

from ...cache_core import CacheRun, Settings
from ...cache_core.meter import Evaluation
from ...cache_core.strategy import FixedSettings, Strategy
from ..page.live_runs import LiveRun, live_runs
from ..page.notices import say
from ..pictures.report_text import report_text
from ..sidecars import calibrations
from ..sidecars.calibrations import CalibrationLookup
from .guests import Guest
from .hooks import detach, listen
from .keys import KEY
from .model_calls import carry_out
from .run_book import RunBook
from .starting import check_transformer, run_start


class HostOptions(NamedTuple):
    """How a cache behaves besides its settings.

    Args:
        choose_device: Whether to keep features in system memory if the device has too little left.
        verbose: Whether to log every evaluation.
        node_id: The node under which notices and the running plan are shown, None for none.
        finds_calibration: Whether to look for the checkpoint's sidecar if the settings have no calibration.
    """

    choose_device: bool = True
    verbose: bool = False
    node_id: str | None = None
    finds_calibration: bool = True


def attach(model: ModelPatcher, settings: Settings | Strategy, options: HostOptions = HostOptions()) -> ModelPatcher:
    """Returns a clone of `model` that samples with the cache, in place of any cache of ours on it.

    A UNet gets no cache, nor does any model in mode "off". A MODEL that ComfyUI itself does not sample is returned as it is, not cloned.

    Args:
        model: The host's MODEL.
        settings: `Settings`, which make a strategy for each run, or one strategy for all runs.
        options: How the cache behaves besides.

    Raises:
        ValueError: For a calibration of another checkpoint.
    """
    if isinstance(settings, Strategy):
        settings = FixedSettings(fixed=settings)
    if not hasattr(getattr(model, "model", None), "diffusion_model"):  # some packs pass networks of their own as MODEL
        say(f"DuCa Cache works on models that ComfyUI itself samples; {type(model).__name__} is passed through unchanged.", options.node_id)
        return model
    clone = detach(model)
    if settings.mode == "off":
        return clone
    try:
        check_transformer(clone)
    except ValueError as reason:
        say(f"{reason} and is passed through unchanged.", options.node_id)
        return clone
    for calibration in (settings.calibration, settings.schedule.calibration if settings.schedule is not None else None):
        if calibration is not None:
            calibrations.check(calibration, clone)
    runs = _Runs(CalibrationLookup(settings, options.finds_calibration, options.node_id), options)
    clone.set_attachments(KEY, runs.book)
    listen(clone, runs.open, runs.finished)
    Guest(runs.open_as_guest, lambda run, is_complete: runs.finished(run, None, is_complete), carry_out).add_to(clone)
    return clone


def book_of(model: ModelPatcher) -> RunBook | None:
    """Returns the finished runs of a model's cache, None for a model without a cache."""
    return model.get_attachment(KEY)


class _Runs:
    """Opens a run for each sampling of one cached model, shows it on the page and keeps its report.

    Args:
        lookup: Finds the settings for a sampling.
        options: How the cache behaves besides.
    """

    def __init__(self, lookup: CalibrationLookup, options: HostOptions) -> None:
        self.book = RunBook()
        self._lookup, self._options = lookup, options
        self._live: dict[CacheRun, LiveRun] = {}  # those that the page shows

    def open(self, patcher: ModelPatcher, sigmas: torch.Tensor, sampler: Any) -> CacheRun | None:
        """Opens a run for these noise levels. Returns None, with a notice to the user, where the cache cannot be used."""
        settings, node_id = self._lookup.settings_for(patcher), self._options.node_id
        try:
            start = run_start(patcher, sigmas, sampler, *settings.part)
        except ValueError as reason:
            say(f"DuCa Cache is not used in this run: {str(reason).removesuffix('.')}.", node_id)
            return None

        def choose_device(needed: int) -> torch.device | None:
            """Returns system memory if the cache would take more than half of the free memory of the device, else None."""
            return None if needed * 2 <= free_memory(patcher, start.device) else torch.device("cpu")

        def on_evaluation(evaluation: Evaluation) -> None:
            if run in self._live:
                self._live[run].evaluation(evaluation)

        strategy = settings.strategy(start)
        run = CacheRun(
            strategy,
            start,
            say=lambda text: say(f"DuCa Cache: {text}.", node_id),
            choose_device=choose_device if self._options.choose_device else None,
            on_evaluation=on_evaluation,
        )
        if node_id is not None:
            self._live[run] = live_runs.begin(node_id, strategy.name, str(run.plan), patcher, start, self._lookup.found)
        return run

    def open_as_guest(self, patcher: ModelPatcher, sigmas: torch.Tensor) -> CacheRun | None:
        """Does the same as `open` for a model that the guider of another model runs."""
        run = self.open(patcher, sigmas, None)
        if run is not None and run.plan.skips:
            run.notify(
                "this is the second model of a guider, where the cache cannot see which sampler is used: with one that adds noise "
                "(ancestral, SDE) remove DuCa Cache from this model"
            )
        return run

    def finished(self, run: CacheRun, result: torch.Tensor | None, is_complete: bool = False) -> None:
        """Closes a run and keeps its report.

        Args:
            run: The run.
            result: The final latent, None where it is not known.
            is_complete: Whether the run came to its end although `result` is None.
        """
        report = run.close(is_complete=is_complete or result is not None)
        self.book.add(report, result)
        if run in self._live:
            live_runs.end(self._live.pop(run), report)
        if self._options.verbose:
            logging.info("[DuCa] %s", report_text(report, verbose=True))


def free_memory(patcher: ModelPatcher, device: torch.device) -> int:
    """Returns the free bytes on the device. On hosts whose patcher can answer, weights that it could move away count as free."""
    asked = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)
    return int(asked(device))

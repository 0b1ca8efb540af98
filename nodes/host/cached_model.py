"""Puts a cache on a MODEL: every sampling of it gets a run, is shown to the page, and leaves a report."""

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

    choose_device: keep features in system memory where the device has too little left.
    verbose: log every evaluation.
    node_id: the node under which notices and the running plan are shown.
    finds_calibration: look for the checkpoint's sidecar where the settings have no calibration.
    """

    choose_device: bool = True
    verbose: bool = False
    node_id: str | None = None
    finds_calibration: bool = True


def attach(model: ModelPatcher, settings: Settings | Strategy, options: HostOptions = HostOptions()) -> ModelPatcher:
    """Returns a clone of `model` that samples with the cache. It replaces any cache of ours on the model.

    A UNet, or mode "off", comes back without one. Settings make a strategy for each run; a strategy given itself is used for all of them.
    Raises ValueError for a calibration of another checkpoint.
    """
    if isinstance(settings, Strategy):
        settings = FixedSettings(fixed=settings)
    if not hasattr(getattr(model, "model", None), "diffusion_model"):  # some packs pass networks of their own as MODEL
        say(f"DuCa Cache serves models that ComfyUI samples; {type(model).__name__} is passed through unchanged.", options.node_id)
        return model
    clone = detach(model)
    if settings.mode == "off":
        return clone
    try:
        check_transformer(clone)
    except ValueError as reason:
        say(f"{reason} and is passed through unchanged.", options.node_id)
        return clone
    if settings.calibration is not None:
        calibrations.check(settings.calibration, clone)
    runs = _Runs(CalibrationLookup(settings, options.finds_calibration, options.node_id), options)
    clone.set_attachments(KEY, runs.book)
    listen(clone, runs.open, runs.finished)
    Guest(runs.open_as_guest, lambda run, is_complete: runs.finished(run, None, is_complete), carry_out).add_to(clone)
    return clone


def book_of(model: ModelPatcher) -> RunBook | None:
    """The finished runs of a model's cache, or None if it has none."""
    return model.get_attachment(KEY)


class _Runs:
    """The runs of one cached model: opens one for each sampling, shows it to the page, and keeps its report."""

    def __init__(self, lookup: CalibrationLookup, options: HostOptions) -> None:
        self.book = RunBook()
        self._lookup, self._options = lookup, options
        self._live: dict[CacheRun, LiveRun] = {}  # those that the page hears of

    def open(self, patcher: ModelPatcher, sigmas: torch.Tensor, sampler: Any) -> CacheRun | None:
        """A run for these noise levels; None, said to the user, where the cache must stand aside."""
        settings, node_id = self._lookup.settings_for(patcher), self._options.node_id
        try:
            start = run_start(patcher, sigmas, sampler, *settings.part)
        except ValueError as reason:
            say(f"DuCa Cache stands aside: {str(reason).removesuffix('.')}.", node_id)
            return None

        def choose_device(needed: int) -> torch.device | None:
            """System memory where the cache would take more than half of what is free on the device."""
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
        """As `open`, of a model that the guider of another one runs."""
        run = self.open(patcher, sigmas, None)
        if run is not None and run.plan.skips:
            run.notify("this is the second model of a guider: with a sampler that adds noise (ancestral, SDE) take the cache off it")
        return run

    def finished(self, run: CacheRun, result: torch.Tensor | None, is_complete: bool = False) -> None:
        """Closes a run. result: the latent that it gave, if that is known. is_complete: whether it came to its end without one."""
        report = run.close(is_complete=is_complete or result is not None)
        self.book.add(report, result)
        if run in self._live:
            live_runs.end(self._live.pop(run), report)
        if self._options.verbose:
            logging.info("[DuCa] %s", report_text(report, verbose=True))


def free_memory(patcher: ModelPatcher, device: torch.device) -> int:
    """Bytes that can be had on the device: where a patcher can answer, weights that it would give back are among them."""
    asked = getattr(patcher, "get_free_memory", comfy.model_management.get_free_memory)
    return int(asked(device))

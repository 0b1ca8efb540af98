"""Works out what a DuCa Cache node would do, from its inputs and before anything is sampled, for the page to draw."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import comfy.model_sampling
import comfy.samplers
import numpy as np
import torch
from torch import nn

from ...cache_core import FAMILIES, Kind, Plan, RunStart, Settings, Timeline
from ...cache_core.calibration.calibration import Calibration, Forecast
from ...cache_core.costs import expected_costs
from ...cache_core.planning.schedule import Schedule
from ...cache_core.planning.text import parse
from ...cache_core.strategy import Strategy
from .. import host
from ..host import samplers
from ..sidecars import calibrations
from .live_runs import Known
from .plan_request import Asked, read

PRESETS = MappingProxyType({"Best quality": 1.5, "Balanced": 2.0, "Fast": 2.8, "Draft": 4.0})
_MEANINGS = MappingProxyType(
    {
        Kind.FULL: "every block runs",
        Kind.INCREMENTAL: "blocks run, with low-rank increments for their layers (ICC)",
        Kind.CONSERVATIVE: "attention is kept, some tokens are recomputed (DuCa)",
        Kind.SKIPPED: "no block runs: the result is reused or forecast",
    }
)


def preview(body: Mapping[str, Any]) -> dict[str, Any]:
    """The answer to the page's request (JSON-ready both). Raises ValueError in words, a ScheduleTextError for a schedule's text."""
    asked = read(body)
    steps = len(asked.steps)
    notes: list[str] = []
    settings, start = asked.settings, _start(asked)
    try:
        strategy = settings.strategy(start)
    except ValueError as reason:
        if asked.network is not None:
            raise
        notes.append(f"{reason} (shown without, until the model has been sampled once)")  # the checkpoint's own may be found then
        strategy = _without_calibration(settings).strategy(start)
    plan = strategy.policy.plan(steps, start.window)
    notes += strategy.notices
    if settings.schedule is not None and settings.schedule.policy == "custom text":
        notes.append(parse(settings.schedule.text).mapping(steps))
    return {
        "steps": steps,
        "assumed_steps": asked.is_assumed,
        "plan": str(plan),
        "name": strategy.name,
        "counts": {kind.value: plan.count(kind) for kind in Kind},
        "kinds": [{"letter": kind.value, "label": kind.label, "meaning": _MEANINGS[kind]} for kind in Kind],
        **_costs(strategy, plan, asked),
        **_quality(settings, asked, plan),
        "notes": notes,
        "presets": [{"name": name, "speedup": speedup} for name, speedup in PRESETS.items()],
    }


def _start(asked: Asked) -> RunStart:
    """As a run would begin: exactly for a model that was sampled before, else with noise levels as far apart as the calibration's."""
    settings, known, network = asked.settings, asked.known, asked.network
    if known is not None and network is not None:
        sigmas = _sigmas(known, asked.sampling, asked.total)[asked.steps.start : asked.steps.stop + 1]
        timeline = Timeline(sigmas.tolist(), host.model_times(known.sampling, sigmas))
        ends = [float(known.sampling.percent_to_sigma(part)) for part in settings.part]
        return RunStart(
            network, known.family, timeline, timeline.window(*ends), known.device, *_steps(asked.sampling, known.sampling, sigmas)
        )
    calibration = settings.calibration
    forecast = calibration.forecast if calibration is not None else None
    times = [*_spread(forecast, asked.total), 0.0][asked.steps.start : asked.steps.stop + 1]
    window = [min(max(round(part * asked.total) - asked.steps.start, 0), len(asked.steps)) for part in settings.part]
    known_steps = _steps(asked.sampling, _Flow(), torch.tensor(times))
    return RunStart(nn.Module(), FAMILIES[0], Timeline(times), range(*window), torch.device("cpu"), *known_steps)


class _Flow(comfy.model_sampling.ModelSamplingDiscreteFlow, comfy.model_sampling.CONST):
    """Of most models that are served, for one that is not known yet."""


def _steps(asked: Mapping[str, Any], sampling: Any, sigmas: torch.Tensor) -> tuple[bool, bool | None]:
    """Whether the sampler takes Euler's steps, and whether it adds noise, as a run would find; Euler's where the page found no sampler."""
    name = asked.get("sampler_name")
    if name not in comfy.samplers.KSampler.SAMPLERS:
        return name is None, False
    sampler = comfy.samplers.sampler_object(name)
    return samplers.is_euler(sampler), samplers.adds_noise(sampling, sampler, sigmas)


def _sigmas(known: Known, sampling: Mapping[str, Any], steps: int) -> torch.Tensor:
    """The host's noise levels, as its KSampler takes them."""
    scheduler, denoise = sampling.get("scheduler"), sampling.get("denoise")
    scheduler = scheduler if scheduler in comfy.samplers.KSampler.SCHEDULERS else "simple"
    part = denoise if isinstance(denoise, (int, float)) and 0 < denoise < 1 else 1.0
    sigmas = comfy.samplers.calculate_sigmas(known.sampling, scheduler, int(steps / part)).cpu()[-(steps + 1) :]
    return sigmas if len(sigmas) == steps + 1 else torch.linspace(1, 0, steps + 1) * sigmas[0]  # some schedulers leave steps out


def _spread(forecast: Forecast | None, steps: int) -> list[float]:
    """Times for a run of `steps` steps: the calibrated ones, between them linear."""
    known = forecast.step_times if forecast is not None else (1.0, 1 / steps)
    return np.interp(np.linspace(0, len(known) - 1, steps), range(len(known)), known).tolist() if steps > 1 else [1.0]


def _without_calibration(settings: Settings) -> Settings:
    """The same in mode auto without a calibration, a searched schedule as a front-loaded one."""
    schedule = settings.schedule
    if schedule is not None:
        policy = "front-loaded" if schedule.needs_forecast else schedule.policy
        schedule = Schedule(policy, schedule.speedup, text=schedule.text, warmup=schedule.warmup, tail=schedule.tail)
    return Settings(mode="auto", speedup=settings.speedup, schedule=schedule)


def _costs(strategy: Strategy, plan: Plan, asked: Asked) -> dict[str, Any]:
    shape = asked.known.shape if asked.known is not None and asked.network is not None else None
    costs = expected_costs(strategy, plan, shape)
    share = costs.compute
    return {"speedup": 1 / share if share else None, "compute": share, "is_counted": costs.is_counted, "cache_bytes": costs.bytes}


def _quality(settings: Settings, asked: Asked, plan: Plan) -> dict[str, Any]:
    """What the calibration says of the picture."""
    calibration, path = settings.calibration, asked.calibration
    if calibration is None or path is None:
        is_looked_for = asked.known is None and bool(calibrations.used_sections(settings))
        text = "not calibrated" + (" yet: a file of its own is looked for at sampling" if is_looked_for else "")
        state = "unused" if path is not None else "none"
        return {
            "calibration": {"state": state, "name": path.name if path else None, "text": text},
            "expected": None,
            "quality": "not calibrated",
        }
    said = {"state": "used", "name": path.name, "text": f"calibrated on {calibration.about.prompt_count} prompts"}
    expected = _expected(calibration, plan)
    quality = f"expected {expected['psnr']:.1f} dB against no cache" if expected is not None else "quality not measured for this"
    return {"calibration": said, "expected": expected, "quality": quality}


def _expected(calibration: Calibration, plan: Plan) -> dict[str, float] | None:
    """PSNR (dB) on the calibration's prompts at this share of full evaluations, between those that were tried; None beyond them."""
    tried = calibration.forecast.tried if calibration.forecast is not None else ()
    if not tried or plan.count(Kind.INCREMENTAL) or plan.count(Kind.CONSERVATIVE):
        return None
    shares = [each.plan.count(Kind.FULL) / len(each.plan) for each in tried][::-1]
    share = plan.count(Kind.FULL) / len(plan)
    if not shares[0] * 0.9 <= share <= max(shares[-1], 0.99):
        return None
    both = {"psnr": [each.psnr for each in tried][::-1], "uncalibrated": [each.uncalibrated for each in tried][::-1]}
    return {name: float(np.interp(share, shares, values)) for name, values in both.items()}

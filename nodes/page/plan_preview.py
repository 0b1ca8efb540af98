"""Works out what a DuCa Cache node would do with its inputs, for the page to show before anything is sampled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
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
        Kind.INCREMENTAL: "blocks run, but linear layers return kept outputs plus a low-rank increment (ICC)",
        Kind.CONSERVATIVE: "attention from the cache, some tokens recomputed (DuCa)",
        Kind.SKIPPED: "no block runs: the result is reused or forecast",
    }
)


def preview(body: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the answer to the page's request for a plan.

    Args:
        body: The request, as read from JSON.

    Returns:
        JSON-ready values. "plan" has a letter for each step; "compute" is the share of the multiply-adds without a cache, "speedup" its
        inverse, "cache_bytes" the bytes of the cache (None if not known), "expected" PSNRs in dB (None if not known).

    Raises:
        ValueError: With a message for the user. For the text of a schedule it is a ScheduleTextError.
    """
    asked = read(body)
    steps = len(asked.steps)
    notes: list[str] = []
    settings, start = asked.settings, _start(asked)
    try:
        strategy = settings.strategy(start)
    except ValueError as reason:
        if asked.network is not None:
            raise
        notes.append(f"{reason} (until the model has been sampled once, the plan is shown without a calibration)")  # it may be found then
        strategy = _without_calibration(settings).strategy(start)
    plan = strategy.policy.plan(steps, start.window)
    notes += strategy.notices
    if settings.schedule is not None and settings.schedule.is_written:
        notes.append(parse(settings.schedule.text).mapping(steps))
    return {
        "steps": steps,
        "assumed_steps": asked.is_assumed,
        "plan": str(plan),
        "name": strategy.name,
        "counts": {kind.value: plan.count(kind) for kind in Kind},
        "kinds": [{"letter": kind.value, "meaning": _MEANINGS[kind]} for kind in Kind],
        **_costs(strategy, plan, asked),
        **_quality(settings, asked, plan),
        "notes": notes,
        "presets": [{"name": name, "speedup": speedup} for name, speedup in PRESETS.items()],
    }


def _start(asked: Asked) -> RunStart:
    """Returns what a run would begin with.

    For a model that was sampled before, this is exact. Else the noise levels are spaced as in the calibration, or evenly without one.
    """
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
    """Stands in for the sampling of a model that is not known yet. Most models have this one."""


def _steps(asked: Mapping[str, Any], sampling: Any, sigmas: torch.Tensor) -> tuple[bool, bool | None]:
    """Returns whether the sampler takes Euler steps and whether it adds noise, as a run would find.

    Where the page found no sampler, Euler's is assumed.
    """
    name = asked.get("sampler_name")
    if name not in comfy.samplers.KSampler.SAMPLERS:
        return name is None, False
    sampler = comfy.samplers.sampler_object(name)
    return samplers.is_euler(sampler), samplers.adds_noise(sampling, sampler, sigmas)


def _sigmas(known: Known, sampling: Mapping[str, Any], steps: int) -> torch.Tensor:
    """Returns the noise levels (steps + 1,) that the host's KSampler would use."""
    scheduler, denoise = sampling.get("scheduler"), sampling.get("denoise")
    scheduler = scheduler if scheduler in comfy.samplers.KSampler.SCHEDULERS else "simple"
    part = denoise if isinstance(denoise, (int, float)) and 0 < denoise < 1 else 1.0
    sigmas = comfy.samplers.calculate_sigmas(known.sampling, scheduler, int(steps / part)).cpu()[-(steps + 1) :]
    return sigmas if len(sigmas) == steps + 1 else torch.linspace(1, 0, steps + 1) * sigmas[0]  # some schedulers leave steps out


def _spread(forecast: Forecast | None, steps: int) -> list[float]:
    """Returns times for a run of `steps` steps, interpolated between those of the calibration; evenly spaced without one."""
    known = forecast.step_times if forecast is not None else (1.0, 1 / steps)
    return np.interp(np.linspace(0, len(known) - 1, steps), range(len(known)), known).tolist() if steps > 1 else [1.0]


def _without_calibration(settings: Settings) -> Settings:
    """Returns the same settings in mode auto without a calibration. A searched schedule becomes one of the usual policy."""
    schedule = settings.schedule
    if schedule is not None:
        policy = Schedule().policy if schedule.needs_forecast else schedule.policy
        schedule = replace(schedule, policy=policy, calibration=None)
    return replace(settings, mode="auto", calibration=None, schedule=schedule)


def _costs(strategy: Strategy, plan: Plan, asked: Asked) -> dict[str, Any]:
    shape = asked.known.shape if asked.known is not None and asked.network is not None else None
    costs = expected_costs(strategy, plan, shape)
    share = costs.compute
    return {"speedup": 1 / share if share else None, "compute": share, "is_counted": costs.is_counted, "cache_bytes": costs.bytes}


def _quality(settings: Settings, asked: Asked, plan: Plan) -> dict[str, Any]:
    """Returns what the calibration says about the quality of the picture."""
    calibration, path = settings.calibration, asked.calibration
    if calibration is None or path is None:
        is_looked_for = asked.known is None and bool(calibrations.used_sections(settings))
        text = "not calibrated" + (" yet: sampling looks for the checkpoint's own calibration" if is_looked_for else "")
        state = "unused" if path is not None else "none"
        return {
            "calibration": {"state": state, "name": path.name if path else None, "text": text},
            "expected": None,
            "quality": "not calibrated",
        }
    said = {"state": "used", "name": path.name, "text": f"calibrated on {calibration.about.prompt_count} prompts"}
    expected = _expected(calibration, plan)
    quality = (
        f"expected PSNR {expected['psnr']:.1f} dB against no cache" if expected is not None else "quality not measured for such a plan"
    )
    return {"calibration": said, "expected": expected, "quality": quality}


def _expected(calibration: Calibration, plan: Plan) -> dict[str, float] | None:
    """Returns the PSNR (dB) to expect, with the calibration and without it. None for a plan that it says nothing about.

    It is the mean over the calibration's prompts, interpolated over the share of full evaluations between the plans that were tried.
    """
    tried = calibration.forecast.tried if calibration.forecast is not None else ()
    if not tried or plan.count(Kind.INCREMENTAL) or plan.count(Kind.CONSERVATIVE):
        return None
    shares = [each.plan.count(Kind.FULL) / len(each.plan) for each in tried][::-1]
    share = plan.count(Kind.FULL) / len(plan)
    if not shares[0] * 0.9 <= share <= max(shares[-1], 0.99):
        return None
    both = {"psnr": [each.psnr for each in tried][::-1], "uncalibrated": [each.uncalibrated for each in tried][::-1]}
    return {name: float(np.interp(share, shares, values)) for name, values in both.items()}

"""Describes a calibration in words."""

from __future__ import annotations

from pathlib import Path

from ...cache_core import Kind
from ...cache_core.calibration.calibration import Calibration, TriedPlan


def calibration_text(calibration: Calibration, path: Path, is_new: bool) -> str:
    """Returns a few lines for users: what the calibration was made on, what to expect of it, and where it is.

    Args:
        calibration: The calibration.
        path: Its sidecar.
        is_new: Whether it was made just now, and not read from an older file.
    """
    about = calibration.about
    size = " x ".join(map(str, about.token_grid))
    schedule = f"{about.steps} steps {about.sampler}/{about.scheduler}, cfg {about.guidance:g}"
    lines = [
        f"{'calibrated' if is_new else 'calibration'}  {about.model_name} ({about.family}), {about.created[:10]}",
        f"made on      {about.prompt_count} prompts, {schedule}, latent {size}",
        f"file         {path}",
    ]
    if calibration.forecast is not None:
        lines.append("forecast     PSNR on its own prompts against no cache, uncalibrated -> calibrated")
        lines += [f"             {_expected(tried)}" for tried in calibration.forecast.tried]
    if calibration.factors is not None:
        energy = calibration.factors.energy.values()
        kept = f"{100 * min(energy):.0f} to {100 * max(energy):.0f} % of the (weighted) square norm kept"
        lines.append(f"factors      {about.method}, rank {about.rank}, {len(energy)} matrices, {kept}")
    return "\n".join(lines)


def _expected(tried: TriedPlan) -> str:
    steps, full = len(tried.plan), tried.plan.count(Kind.FULL)
    how = "uncalibrated forecast" if tried.share is None else f"{100 * tried.share:.0f} % calibrated forecast"
    if tried.searched_from:
        how += ", searched plan"
    return f"{steps / full:4.1f}x {tried.uncalibrated:5.1f} -> {tried.psnr:5.1f} dB  {tried.plan}  {how}"

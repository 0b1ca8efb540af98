"""Draws a calibration: the expected error and sensitivity of every step, and the share of every layer that its factors keep."""

from __future__ import annotations

import numpy as np
import torch
from matplotlib.figure import Figure

from ...cache_core import Kind
from ...cache_core.calibration.calibration import Calibration, Factors, Forecast
from ...cache_core.calibration.use import error_of
from ...cache_core.predictors import AUTO
from .figures import image_of

_ERROR, _SENSITIVITY, _FULL = "#D55E00", "#0072B2", "#999999"  # Okabe and Ito's palette


def calibration_plot(calibration: Calibration) -> torch.Tensor:
    """Returns the plot as an image (1, H, W, 3) in 0..1."""
    forecast, factors = calibration.forecast, calibration.factors
    panels = (forecast is not None) + (factors is not None)
    figure = Figure(figsize=(9, 3.4 * panels), dpi=110, layout="constrained")
    axes = iter(figure.subplots(panels, 1, squeeze=False)[:, 0])
    if forecast is not None:
        _draw_forecast(next(axes), forecast)
    if factors is not None:
        _draw_factors(next(axes), factors, f"{calibration.about.method}, rank {calibration.about.rank}")
    return image_of(figure)


def expected_errors(forecast: Forecast, number: int) -> list[float | None]:
    """Returns the relative root mean square error of every step's forecast, None where the step is full.

    Args:
        number: Which of the forecast's tried plans.
    """
    tried = forecast.tried[number]
    error = error_of(forecast.model, tried.share)
    errors: list[float | None] = []
    anchors: list[float] = []
    for time, kind in zip(forecast.step_times, tried.plan.kinds):
        if kind is Kind.FULL:
            anchors = [*anchors, time][-AUTO.history :]
            errors.append(None)
            continue
        errors.append((error(anchors, time) / forecast.model.power(time)) ** 0.5)
    return errors


def _draw_forecast(axes, forecast: Forecast) -> None:
    """Draws errors and sensitivities of one of the tried plans: that of the middle speed."""
    number = len(forecast.tried) // 2
    tried = forecast.tried[number]
    errors = expected_errors(forecast, number)
    steps = np.arange(len(errors))
    axes.bar(steps, [100 * (error or 0.0) for error in errors], color=_ERROR, width=0.8, label="expected error of a skipped step")
    for step in (step for step in steps if errors[step] is None):
        axes.axvspan(step - 0.4, step + 0.4, color=_FULL, alpha=0.25, linewidth=0)
    axes.set_xlabel("step (grey: computed in full)")
    axes.set_ylabel("% of the hidden state")
    other = axes.twinx()
    other.plot(steps, forecast.model.sensitivities(forecast.step_times), color=_SENSITIVITY, marker=".", label="sensitivity")
    other.set_yscale("log")
    other.set_ylabel("effect on the picture")
    speed = len(tried.plan) / tried.plan.count(Kind.FULL)
    axes.set_title(f"{speed:.1f}x: {tried.uncalibrated:.1f} dB uncalibrated, {tried.psnr:.1f} dB calibrated", fontsize=10)
    handles = [*axes.get_legend_handles_labels()[0], *other.get_legend_handles_labels()[0]]
    axes.legend(handles=handles, frameon=False, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.18))


def _draw_factors(axes, factors: Factors, title: str) -> None:
    names = sorted(factors.energy)
    axes.bar(range(len(names)), [100 * factors.energy[name] for name in names], color=_SENSITIVITY, width=1.0)
    axes.set_ylim(0, 100)
    axes.set_ylabel("% of square norm kept")
    starts = [i for i, name in enumerate(names) if i == 0 or name.split(".")[:2] != names[i - 1].split(".")[:2]]
    shown = starts[:: max(1, len(starts) // 12)]
    axes.set_xticks(shown, [".".join(names[i].split(".")[:2]) for i in shown], rotation=30, ha="right", fontsize=8)
    axes.set_title(f"singular-value energy per layer: {title}", fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)

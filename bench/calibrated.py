"""Measures picture quality with a calibration: calibrated forecasts and ICC beside the settings that need no calibration, in one run.

Calibrates the demo model on 16 prompts and measures on the 16 others of bench/quality.py; euler, simple, 28 steps, guidance 2.5.
`--quick` takes 4 prompts of each. `--keep=FOLDER` saves the calibrations in that folder, and uses those that are there already. Writes
its tables to docs/benchmarks.md.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common import machine, publish, start, table

start()
import torch
from comfyui_duca.cache_core import Kind, Settings
from comfyui_duca.cache_core.calibration.calibration import ORIGINS, Calibration, Factors
from comfyui_duca.cache_core.calibration.sidecar import read, write
from comfyui_duca.cache_core.calibration.use import nested_plan, searched_plan
from comfyui_duca.cache_core.planning.policies import DucaCycle, FixedInterval, FrontLoaded, Given
from comfyui_duca.cache_core.predictors import AUTO, Calibrated, Chebyshev, Predictor, Reuse, Taylor
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.cache_core.tuning import Wishes
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from comfyui_duca.nodes.sidecars.calibrating import Sampling, calibrate
from quality import EVEN_INTERVAL, GUIDANCE, PROMPTS, STEPS, Bench

LEARNED_FROM = (
    "green apple", "dog face", "airplane", "hot dog", "crying face", "sunflower", "mount fuji", "trophy",
    "french fries", "bus", "thinking face", "grapes", "chicken", "house", "fish", "umbrella",
)  # fmt: skip
SPEEDS = {2.0: 14, 2.8: 10, 3.5: 8, 4.7: 6, 5.6: 5}  # full evaluations of 28
METHODS = {"svd": "SVD", "ca_svd": "CA-SVD", "cd_svd": "CD-SVD"}
RANKS = (8, 16, 32, 64, 128)
HEADER = ["setting", "full / incremental / conservative / skipped", "compute ×", "PSNR dB", "median", "SSIM"]


@dataclass(frozen=True)
class WeightsOnly(Predictor):
    """Forecasts with the calibrated weights w alone, without the correction A."""

    calibrated: Calibrated
    history: int = AUTO.history

    def weights(self, anchors: Sequence[float], time: float) -> list[float]:
        return self.calibrated.weights(anchors, time)


def learn(prompts: Sequence[str], method: str = "") -> Calibration:
    """Calibrates the demo model, or reads the calibration that `--keep` has saved.

    Args:
        prompts: Prompts to calibrate on.
        method: A key of METHODS makes ICC factors of the highest rank and no forecast; "" makes a forecast and no factors.
    """
    sampling = Sampling(
        [encode_prompt(prompt) for prompt in prompts], [encode_prompt("")] * len(prompts), torch.zeros(1, 3, 48, 48),
        "euler", "simple", STEPS, GUIDANCE, 100,
    )  # fmt: skip
    kept = next((Path(a.removeprefix("--keep=")) for a in sys.argv if a.startswith("--keep=")), None)
    path = kept / f"{method or 'forecast'}-{len(prompts)}.duca.safetensors" if kept is not None else None
    if path is not None and path.exists():
        return Calibration.from_sidecar(read(path))
    began = time.time()
    calibration = calibrate(load_demo_model(), sampling, Wishes(not method, method, RANKS[-1]), "demo flux")
    print(f"calibrated {method or 'forecast'} in {time.time() - began:.0f} s", flush=True)
    if calibration.forecast is not None:
        print(*(f"{c.plan} {c.share} {c.uncalibrated:.2f} -> {c.psnr:.2f}" for c in calibration.forecast.tried), sep="\n", flush=True)
    if path is not None:
        write(path, calibration.to_sidecar())
    return calibration


def at_rank(calibration: Calibration, rank: int) -> Calibration:
    """Returns a calibration whose factors are cut to a lower rank: their leading directions are the factors of that rank."""
    assert calibration.factors is not None
    cut = {n: t[:, :rank] if n.endswith(".A") else t[:rank] for n, t in calibration.factors.tensors.items()}
    return replace(calibration, about=replace(calibration.about, rank=rank), factors=Factors(cut, calibration.factors.energy))


def uncalibrated(full: int) -> dict[str, Settings | None]:
    """Returns the rows that need no calibration, each with about `full` full evaluations; None stands for fewer steps without a cache."""
    interval, auto = EVEN_INTERVAL[full], FrontLoaded(STEPS / full)
    even = FixedInterval(interval, 3, 1)
    return {
        "no cache, fewer steps": None,
        "FORA, even gaps": Strategy(DucaCycle(interval, "c", 3, 1), Reuse(), token_share=0.0),
        "DuCa (share 0.1), even gaps": Strategy(DucaCycle(interval, "ca", 3, 1), Reuse(), token_share=0.1),
        "Taylor 1, even gaps": Strategy(even, Taylor(1)),
        "Chebyshev, even gaps": Strategy(even, Chebyshev(history=100)),
        "Taylor 1, auto's plan": Strategy(auto, Taylor(1)),
        "Chebyshev, auto's plan": Strategy(auto, Chebyshev(history=100)),
        "auto's plan and predictor, nothing corrected": Strategy(auto, AUTO),
        "**auto, uncalibrated**": Settings(speedup=STEPS / full),
    }


def calibrated(full: int, learned: Calibration) -> dict[str, Settings | None]:
    """Returns the rows that use the calibration's forecast or its plans, each with `full` full evaluations."""
    forecast = learned.forecast
    assert forecast is not None
    model, auto, times, steps = forecast.model, FrontLoaded(STEPS / full), forecast.step_times, range(STEPS)
    searched, other = (Given(searched_plan(forecast, times, steps, full, start, True)) for start in ORIGINS)
    nested = Given(nested_plan(forecast, times, steps, full, True))
    uncorrected = Given(searched_plan(forecast, times, steps, full, ORIGINS[0], False))
    chosen = {
        "w, auto's plan": Strategy(auto, WeightsOnly(Calibrated(model))),
        "w and A, auto's plan": Strategy(auto, Calibrated(model)),
        "half w and A, auto's plan": Strategy(auto, Calibrated(model, 0.5)),
        "uncalibrated forecast, searched plan": Strategy(searched, AUTO),
        "w and A, searched plan": Strategy(searched, Calibrated(model)),
        "half w and A, searched plan": Strategy(searched, Calibrated(model, 0.5)),
        "half w and A, plan searched from even gaps": Strategy(other, Calibrated(model, 0.5)),
        "half w and A, nested searched plan": Strategy(nested, Calibrated(model, 0.5)),
    }
    return {
        **{name: replace(strategy, corrects=True) for name, strategy in chosen.items()},
        "half w and A, plan searched for it, nothing corrected": Strategy(uncorrected, Calibrated(model, 0.5)),
        "**auto, calibrated** (tried out)": Settings(speedup=STEPS / full, calibration=learned),
    }


def icc(speed: float, factors: dict[str, Calibration]) -> dict[str, Settings | None]:
    """Returns the rows of ICC at one speed, by method and rank."""
    return {
        f"ICC {METHODS[method]} rank {rank}": Settings(mode="icc", speedup=speed, calibration=at_rank(factors[method], rank))
        for rank in (16, 32)
        for method in METHODS
    }


def everything() -> tuple[Calibration, dict[str, Calibration], Sequence[str]]:
    """Returns a calibration with a forecast, one with factors for each method, and the prompts to measure on."""
    quick = "--quick" in sys.argv
    learned_from, measured = (LEARNED_FROM[:4], PROMPTS[:4]) if quick else (LEARNED_FROM, PROMPTS)
    learned = learn(learned_from)
    return learned, {method: learn(learned_from[: len(learned_from) // 2], method) for method in METHODS}, measured


def main() -> None:
    learned, factors, measured = everything()
    bench = Bench(measured)
    bench.kinds = tuple(Kind)
    sections = []
    for speed, full in SPEEDS.items():
        rows = [bench.row(name, settings, full) for name, settings in uncalibrated(full).items()]
        ours = calibrated(full, learned) | (icc(speed, factors) if speed < 3 else {})  # ICC reaches no higher speed
        rows += [bench.row(name, settings) for name, settings in ours.items()]
        sections.append(f"\n**about {speed}× ({full} full evaluations of {STEPS})**\n\n{table(HEADER, rows)}")
    prompts = f"{len(measured)} prompts, calibrated on {learned.about.prompt_count} others"
    publish("calibrated", f"{prompts}, {STEPS} euler steps, guidance {GUIDANCE}; {machine()}.\n" + "\n".join(sections))


if __name__ == "__main__":
    main()

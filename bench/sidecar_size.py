"""Measures how large a FLUX.1-dev calibration is and how long its parts take to make, from files of a few blocks of real width.

One double and two single blocks, width 3072, random bfloat16 weights; statistics of 32 evaluations with FLUX's channels. The size for all
blocks is computed from the shapes of these. Writes its table to docs/benchmarks.md.
"""

from __future__ import annotations

import resource
import tempfile
import time
from pathlib import Path

from common import machine, publish, start, table

start()
import torch
from comfyui_duca.cache_core import Kind, Plan
from comfyui_duca.cache_core.calibration.calibration import Calibration, Factors, Forecast, TriedPlan
from comfyui_duca.cache_core.calibration.fingerprint import Fingerprint
from comfyui_duca.cache_core.calibration.low_rank import factorise_sites
from comfyui_duca.cache_core.calibration.sidecar import About, read, write
from comfyui_duca.cache_core.calibration.statistics import Moments
from comfyui_duca.cache_core.engine.linear_sites import linear_sites
from comfyui_duca.cache_core.families.flux import FLUX
from overhead import CONFIG, Overhead

RANK, NODES, DIRECTIONS = 128, 32, 128
CHANNELS, INPUTS = 3072, 64
DOUBLE, SINGLE = 19, 38  # numbers of blocks of FLUX.1-dev
GIB, MIB = 2**30, 2**20


def about(times: list[float]) -> About:
    """Returns the description that a sidecar needs, with the model's times of its evaluations."""
    return About(
        "flux", "size", "euler", "simple", NODES, 3.5, (*times, 0.0), tuple(times), (128, 128), 8, tuple(range(8)), RANK, "svd",
        {"pack": "0"}, "2026-01-01",
    )  # fmt: skip


def peak() -> int:
    """Returns the peak memory of this process so far, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def size_of(calibration: Calibration) -> tuple[int, float]:
    """Returns the bytes of a calibration's file and the seconds that writing and reading it take."""
    with tempfile.TemporaryDirectory() as folder:
        path, began = Path(folder) / "size.safetensors", time.time()
        write(path, calibration.to_sidecar())
        read(path)
        return path.stat().st_size, time.time() - began


def forecast(times: list[float]) -> tuple[Forecast, float]:
    """Returns a forecast from random trajectories, and the seconds that compressing its statistics takes."""
    moments, generator = Moments(), torch.Generator().manual_seed(0)
    moments.add(torch.randn(NODES, 256, INPUTS, generator=generator), torch.randn(NODES, 256, CHANNELS, generator=generator))
    began = time.time()
    model = moments.compress(times, DIRECTIONS)
    choice = TriedPlan(Plan((Kind.FULL,) + (Kind.SKIPPED,) * (NODES - 1)), 0.5, 30.0, 29.0)
    return Forecast(model, tuple(times), (choice,) * 6), time.time() - began


def main() -> None:
    times = [1 - i / NODES for i in range(NODES)]
    bench = Overhead()
    network = bench.network
    with torch.inference_mode():
        known = bench.known()
    fingerprint = Fingerprint.of(network.named_parameters())
    sites = linear_sites(FLUX, known.layer_calls, network)
    before, began = peak(), time.time()
    tensors, energy = factorise_sites(sites, RANK, "svd", None, torch.bfloat16, torch.device("cpu"))
    seconds, grown = time.time() - began, peak() - before
    per_stack = {path: sum(t.nbytes for name, t in tensors.items() if name.startswith(path)) for path in ("double_blocks", "single_blocks")}
    whole = DOUBLE * per_stack["double_blocks"] + SINGLE // CONFIG["depth_single_blocks"] * per_stack["single_blocks"]
    icc_file, icc_time = size_of(Calibration(about(times), fingerprint, factors=Factors(tensors, energy)))
    largest = max(site.in_features * site.out_features for site in sites) * 4
    learned, compressing = forecast(times)
    forecast_file, forecast_time = size_of(Calibration(about(times), fingerprint, forecast=learned))
    rows = [
        [f"forecast part, {NODES} evaluations, {DIRECTIONS} directions: the file", f"{forecast_file / MIB:.1f} MiB", "≤ 64 MiB"],
        [f"ICC part at rank {RANK}, {DOUBLE} double and {SINGLE} single blocks", f"{whole / GIB:.4f} GiB", "≤ 1 GiB"],
        ["ICC part of one double and two single blocks: the file", f"{icc_file / MIB:.2f} MiB", ""],
        ["written and read with all checks: forecast / ICC of three blocks", f"{forecast_time:.1f} s / {icc_time:.1f} s", ""],
        ["factorising three blocks", f"{seconds:.0f} s", ""],
        ["system memory on top while factorising", f"{grown / MIB:.0f} MiB", f"(largest layer in float32: {largest / MIB:.0f} MiB)"],
        ["compressing the statistics", f"{compressing:.1f} s", ""],
    ]
    publish("sidecar", f"Width {CONFIG['hidden_size']}; {machine()}.\n\n{table(['what', 'measured', 'target'], rows)}")


if __name__ == "__main__":
    main()

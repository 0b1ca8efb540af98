"""Makes calibrations for tests, from features that are smooth paths."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from comfyui_duca.cache_core import Plan
from comfyui_duca.cache_core.calibration.calibration import Calibration, Factors, Forecast, TriedPlan
from comfyui_duca.cache_core.calibration.fingerprint import Fingerprint
from comfyui_duca.cache_core.calibration.sidecar import About
from comfyui_duca.cache_core.calibration.statistics import ForecastModel, Moments

N, K, TOKENS, D, C, R = 7, 9, 60, 3, 8, 5


TIMES = (1.0, 0.9, 0.75, 0.55, 0.4, 0.2, 0.1)  # recorded times


STEP_TIMES = tuple(1 - i / 10 for i in range(K))  # of the calibrated noise levels


CPU = torch.device("cpu")


def features():
    """Returns u (n, T, d) and z (n, T, C), both float64. They are smooth paths, and z is partly a linear image of u."""
    random = np.random.default_rng(5)
    u = random.normal(size=(N, TOKENS, D)).cumsum(0)
    return u, u @ random.normal(size=(D, C)) + 0.4 * random.normal(size=(N, TOKENS, C)).cumsum(0)


def orthonormal(random=7):
    return np.linalg.qr(np.random.default_rng(random).normal(size=(C, R)))[0]


def model_of(sensitivity=(1.0, 3.0, 2.0, 5.0, 0.5, 1.5, 4.0)) -> ForecastModel:
    """Returns the statistics of `features`, summed up token by token."""
    u, z = features()
    gram = np.einsum("atc,btc->ab", z, z) / TOKENS
    uu, uz = np.einsum("atd,bte->abde", u, u) / TOKENS, np.einsum("atd,btc->abdc", u, z) / TOKENS
    tensors = (torch.from_numpy(values) for values in (gram, uu, uz @ orthonormal(), orthonormal()))
    return ForecastModel(TIMES, *tensors, None if sensitivity is None else torch.tensor(sensitivity, dtype=torch.float64))


def forecast_of(model=None, *tried: TriedPlan) -> Forecast:
    tried = tried or (
        TriedPlan(Plan.parse("FFaFaFaFa"), 0.5, 34.5, 33.25),
        TriedPlan(Plan.parse("FaaFaaaFa"), None, 30.125, 30.125),
        TriedPlan(Plan.parse("Faaaaaaaa"), 0.0, 20.0, 19.0, "even gaps"),
    )
    return Forecast(model_of() if model is None else model, STEP_TIMES, tried)


def some_factors() -> Factors:
    """Returns factors of three layers, in an order that differs from that of their names."""
    random = torch.Generator().manual_seed(3)
    tensors = {}
    for part, rank in (("s.1.l.p", 2), ("d.0.l.q", 3), ("d.0.l.k", 1)):
        tensors |= {f"{part}.A": torch.randn(6, rank, generator=random).half(), f"{part}.B": torch.randn(rank, 4, generator=random).half()}
    return Factors(tensors, {"s.1.l.p": 0.5, "d.0.l.q": 0.75, "d.0.l.k": 0.25})


def calibration_of(forecast: Forecast | None, factors: Factors | None) -> Calibration:
    about = About(
        family="flux", model_name="m", sampler="euler", scheduler="simple", steps=K, guidance=2.5, sigmas=(*STEP_TIMES, 0.0), times=TIMES,
        token_grid=(12, 12), prompt_count=2, seeds=(0, 1), rank=3 if factors else 0, method="ca_svd" if factors else "",
        versions={"pack": "0.1"}, created="2026-01-02",
    )  # fmt: skip
    return Calibration(about, Fingerprint.of([("w", torch.linspace(-1, 1, 300).view(3, 100))]), forecast, factors)


def random_forecast(seed: int, nodes: int = 12):
    """Returns a forecast model of random trajectories."""
    moments, generator = Moments(), torch.Generator().manual_seed(seed)
    z = torch.randn(nodes, 40, 6, generator=generator).cumsum(0)
    moments.add(torch.randn(nodes, 40, 3, generator=generator).cumsum(0), z)
    times = [1 - i / nodes for i in range(nodes)]
    learned = moments.compress(times, 6)
    return Forecast(replace(learned, sensitivity=torch.rand(nodes, generator=generator).double() + 0.1), tuple(times), ())

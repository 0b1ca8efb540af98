"""Makes a sidecar for tests, and compares two."""

from __future__ import annotations

from pathlib import Path

import torch
from comfyui_duca.cache_core.calibration.fingerprint import Fingerprint
from comfyui_duca.cache_core.calibration.sidecar import About, Sidecar
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]


N, K, P, D, C, R = 4, 6, 2, 3, 10, 2


ABOUT = About(
    family="flux",
    model_name="emoji ☺ flux 48",
    sampler="euler",
    scheduler="simple",
    steps=K,
    guidance=2.5,
    sigmas=(1.0, 0.85, 0.7, 0.5, 0.3, 0.1, 0.0),
    times=(1.0, 0.7, 0.4, 0.1),
    token_grid=(12, 12),
    prompt_count=8,
    seeds=(0, 2**63),
    rank=5,
    method="ca_svd",
    versions={"pack": "0.1", "torch": "2", "comfyui": "0.3"},
    created="2026-01-02",
)


def weights(seed: int = 0, std: float = 0.02, count: int = 70) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    named = {f"blocks.{i}.w": std * torch.randn(12, 16 + i, generator=g) for i in range(count)}
    return named | {"blocks.0.scale": torch.ones(1), "ids": torch.arange(100)}


def sidecar(seed: int = 0) -> Sidecar:
    g = torch.Generator().manual_seed(seed)
    forecast = {
        "gram": torch.randn(N, N, generator=g, dtype=torch.float64),
        "uu": torch.randn(N, N, D, D, generator=g),
        "uz": torch.randn(N, N, D, R, generator=g).half(),
        "basis": torch.randn(C, R, generator=g),
        "sensitivity": torch.rand(N, generator=g, dtype=torch.float64),
        "step_times": torch.rand(K, generator=g, dtype=torch.float64),
        "plans": torch.randint(3, (P, K), generator=g).float(),
        "results": torch.rand(P, 4, generator=g, dtype=torch.float64),
    }
    icc = {"energy": torch.rand(2, generator=g)}
    for part, out, inner, rank in (("double.0.img_attn.qkv.q", 7, 6, 5), ("single.1.linear1.mlp", 9, 4, 3)):
        icc[f"{part}.A"] = torch.randn(out, rank, generator=g).half()
        icc[f"{part}.B"] = torch.randn(rank, inner, generator=g).bfloat16()
    return Sidecar(ABOUT, Fingerprint.of(weights(seed, count=3).items()), {"forecast": forecast, "icc": icc})


def same(a: Sidecar, b: Sidecar, sections=("forecast", "icc")) -> bool:
    left = {(s, n): t for s in sections for n, t in a.sections[s].items()} | {"values": a.fingerprint.values}
    right = {(s, n): t for s in sections for n, t in b.sections[s].items()} | {"values": b.fingerprint.values}
    alike = all(torch.equal(left[k], right[k]) and left[k].dtype is right[k].dtype for k in left) if left.keys() == right.keys() else False
    return alike and a.about == b.about and a.fingerprint.matches(b.fingerprint) and a.fingerprint.dtype == b.fingerprint.dtype

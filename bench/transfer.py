"""Measures a calibration in other settings than the one it was made in, and ICC's factors by method and rank, on the demo model.

16 prompts of bench/quality.py, calibrated on 16 others; options as in bench/calibrated.py. In the other settings every prompt is sampled
with four noises: with one noise, the gain is only known to half a decibel. Writes its tables to docs/benchmarks.md.
"""

from __future__ import annotations

from collections.abc import Sequence

from common import machine, publish, start, table

start()
import comfy.sample
import numpy as np
import torch
from calibrated import METHODS, RANKS, at_rank, everything
from comfyui_duca.cache_core import Settings
from comfyui_duca.cache_core.calibration.calibration import Calibration
from quality import GUIDANCE, STEPS, Bench, conditioning


def ranks(bench: Bench, factors: dict[str, Calibration]) -> str:
    """Returns a table of ICC with SVD, CA-SVD and CD-SVD over ranks, where every 4th evaluation is full."""
    rows = []
    for rank in RANKS:
        values = [bench.row(f"{m} {rank}", Settings(mode="icc", cycle_length=4, calibration=at_rank(factors[m], rank))) for m in METHODS]
        rows.append([str(rank), values[0][2], *(value[3] for value in values)])
    return table(["rank", "compute ×", *METHODS.values()], rows)


SPEEDS = (3.5, 4.7)
NOISES = 4  # for every prompt; the first is the noise of the other benchmarks


def elsewhere(learned: Calibration, prompts: Sequence[str]) -> dict[float, str]:
    """Returns one table per speed of auto with a calibration, in other settings than its own, against auto without one."""
    rows: dict[float, list[list[str]]] = {speed: [] for speed in SPEEDS}
    cases: list[tuple[str, dict]] = [
        ("as calibrated", {}),
        ("20 steps", {"steps": 20}),
        ("40 steps", {"steps": 40}),
        ("scheduler beta", {"scheduler": "beta"}),
        ("sampler dpmpp_2m", {"sampler": "dpmpp_2m"}),
        ("guidance 1.5", {"guidance": 1.5}),
        ("guidance 5", {"guidance": 5.0}),
        ("64×64", {"size": (64, 64)}),
        ("48×72", {"size": (48, 72)}),
        ("denoise 0.6", {"denoise": 0.6}),
        ("a LoRA of modest strength", {"lora": 0.1}),
    ]
    for name, setting in cases:
        other = Elsewhere(list(prompts) * NOISES, **setting)
        for speed in SPEEDS:
            without = other.row(f"{name}: auto {speed:g}", Settings(speedup=speed))
            plain = other.psnr
            having = other.row(f"{name}: calibrated {speed:g}", Settings(speedup=speed, calibration=learned))
            gains = np.subtract(other.psnr, plain).reshape(NOISES, -1).mean(0)  # one per prompt: pictures of one prompt are not independent
            gain = f"{gains.mean():+.2f} ± {gains.std(ddof=1) / len(gains) ** 0.5:.2f}"
            rows[speed].append([name, without[3], having[3], gain, without[5], having[5]])
    header = ["setting", "auto, PSNR dB", "calibrated", "gain", "auto, SSIM", "calibrated"]
    return {speed: table(header, own) for speed, own in rows.items()}


def with_lora(model, strength: float):
    """Returns the model with a random matrix of rank 4 added to every linear weight of its blocks, of `strength` times its norm."""
    generator, patches = torch.Generator().manual_seed(0), {}
    for name, weight in model.model.diffusion_model.named_parameters():
        if weight.ndim == 2 and "_blocks." in name:
            low = torch.randn(weight.shape[0], 4, generator=generator) @ torch.randn(4, weight.shape[1], generator=generator)
            patches[f"diffusion_model.{name}"] = (low * (strength * weight.norm() / low.norm()),)
    clone = model.clone()
    clone.add_patches(patches)
    return clone


class Elsewhere(Bench):
    """Makes the measurements of Bench in another setting, such as another sampler or guidance."""

    def __init__(
        self, prompts, steps=STEPS, sampler="euler", scheduler="simple", guidance=GUIDANCE, size=(48, 48), denoise=1.0, lora=0.0
    ) -> None:  # fmt: skip
        self._how = (guidance, sampler, scheduler)
        self._denoise = denoise
        super().__init__(prompts)
        self.latent = torch.zeros(len(prompts), 3, *size)
        if lora:
            self.model = with_lora(self.model, lora)
        if denoise < 1:  # such a sampling starts from finished pictures
            self.latent = torch.from_numpy(self.pictures(self.model, STEPS)).movedim(-1, 1) * 2 - 1
        self.noise = comfy.sample.prepare_noise(self.latent, 0)
        self.refer_to(steps)

    def pictures(self, model, steps: int) -> np.ndarray:
        positive, negative = conditioning(self.prompts), conditioning([""] * len(self.prompts))
        denoise = self._denoise if self.latent.count_nonzero() else 1.0
        latents = comfy.sample.sample(
            model, self.noise, steps, *self._how, positive, negative, self.latent, denoise=denoise, seed=0, disable_pbar=True
        )
        return ((latents.clamp(-1, 1) + 1) / 2).movedim(1, -1).numpy()


def main() -> None:
    learned, factors, measured = everything()
    sections = [
        *(f"\n**away from the calibrated setting, at {speed}×**\n\n{rows}" for speed, rows in elsewhere(learned, measured).items()),
        f"\n**ICC by rank, full every 4th evaluation: PSNR dB**\n\n{ranks(Bench(measured), factors)}",
    ]
    about = (
        f"{len(measured)} prompts ({NOISES} noises of each but for ICC), otherwise {STEPS} euler steps, guidance {GUIDANCE}; {machine()}.\n"
    )
    publish("transfer", about + "\n".join(sections))


if __name__ == "__main__":
    main()

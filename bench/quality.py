"""Measures picture quality at equal compute, without a calibration, against the uncached 28-step pictures of the demo model.

16 prompts that were not used to choose any setting; euler, scheduler simple, guidance 2.5, through the host's own sampler.
`--quick` takes 4 prompts. Writes its table to docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from functools import cached_property

from common import machine, publish, start, table

start()
import comfy.sample
import numpy as np
import torch
from comfyui_duca.cache_core import Kind, Settings
from comfyui_duca.cache_core.planning.policies import DucaCycle, FixedInterval, FrontLoaded
from comfyui_duca.cache_core.predictors import AUTO, Chebyshev, Reuse, Taylor
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import encode_prompt, load_demo_model
from growing_gaps import GrowingGaps
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

STEPS, GUIDANCE = 28, 2.5
PROMPTS = (
    "red apple", "tiger face", "rocket", "pizza", "grinning face", "cherry blossom", "volcano", "guitar",
    "octopus", "hamburger", "snowman", "sports car", "smiling face with sunglasses", "banana", "penguin", "castle",
)  # fmt: skip
SPEEDS = {1.4: 20, 2.0: 14, 2.8: 10, 3.5: 8, 4.7: 6, 5.6: 5}  # full evaluations of 28
EVEN_INTERVAL = {20: 1, 14: 3, 10: 4, 8: 6, 6: 9, 5: 14}  # by full evaluations: the interval that gives about as many after 3 warm-up steps


def conditioning(prompts) -> list:
    """Returns all prompts as one cond whose batch rows are the prompts."""
    parts = [encode_prompt(prompt)[0] for prompt in prompts]
    return [[torch.cat([c for c, _ in parts]), {"pooled_output": torch.cat([extra["pooled_output"] for _, extra in parts])}]]


class Bench:
    """Samples pictures with the demo model and compares them with the uncached ones.

    Attributes:
        kinds: Kinds of evaluation that a row counts.
        psnr: PSNR of every picture of the last row, in dB.
    """

    kinds: tuple[Kind, ...] = (Kind.FULL, Kind.CONSERVATIVE, Kind.SKIPPED)

    def __init__(self, prompts) -> None:
        self.model, self.prompts = load_demo_model(), prompts
        self.latent = torch.zeros(len(prompts), 3, 48, 48)
        self.noise = comfy.sample.prepare_noise(self.latent, 0)
        self.steps = STEPS
        self.psnr: list[float] = []

    def refer_to(self, steps: int) -> None:
        """Makes the uncached pictures of another number of steps the reference from here on."""
        self.steps = steps
        self.__dict__.pop("reference", None)

    @cached_property
    def reference(self) -> np.ndarray:
        """The uncached pictures (N, 48, 48, 3), sampled when they are first needed."""
        return self.pictures(self.model, self.steps)

    def pictures(self, model, steps: int) -> np.ndarray:
        """Samples all prompts and returns their pictures, (N, 48, 48, 3) in 0..1 as decoded images are."""
        positive, negative = conditioning(self.prompts), conditioning([""] * len(self.prompts))
        latents = comfy.sample.sample(
            model, self.noise, steps, GUIDANCE, "euler", "simple", positive, negative, self.latent, seed=0, disable_pbar=True
        )
        return ((latents.clamp(-1, 1) + 1) / 2).movedim(1, -1).numpy()

    def distances(self, pictures: np.ndarray) -> list[str]:
        """Returns mean PSNR (dB), its median over the prompts and mean SSIM against the uncached pictures."""
        pairs = list(zip(self.reference, pictures))
        self.psnr = [peak_signal_noise_ratio(a, b, data_range=1.0) for a, b in pairs]
        ssim = np.mean([structural_similarity(a, b, data_range=1.0, channel_axis=-1) for a, b in pairs])
        return [f"{np.mean(self.psnr):.2f}", f"{np.median(self.psnr):.2f}", f"{ssim:.4f}"]

    def row(self, name: str, settings: Settings | None, steps: int | None = None) -> list[str]:
        """Samples with settings and returns the cells of the table's row.

        Args:
            name: First cell of the row.
            settings: What the cache does; None for no cache.
            steps: Number of steps without a cache; not used with one, which always takes the steps of the reference.
        """
        if settings is None:
            assert steps is not None
            distances = self.distances(self.pictures(self.model, steps))
            values = [" / ".join([str(steps), *["0"] * (len(self.kinds) - 1)]), f"{self.steps / steps:.2f}", *distances]
        else:
            cached = host.attach(self.model, settings, host.HostOptions(finds_calibration=False))
            distances = self.distances(self.pictures(cached, self.steps))
            report = host.book_of(cached).last
            counts = " / ".join(str(report.count(kind)) for kind in self.kinds)
            values = [counts, f"{report.compute_speedup:.2f}", *distances]
        print(name, *values, flush=True)
        return [name, *values]


def settings_at(speed: float, full: int) -> dict[str, Settings | Strategy | None]:
    """Returns the rows of one speed, all with about `full` full evaluations; conservative ones come on top of these."""
    interval = EVEN_INTERVAL[full]
    rows: dict[str, Settings | Strategy | None] = {
        "no cache, fewer steps": None,
        "**auto**": Settings(speedup=STEPS / full),
        "auto, nothing corrected": Strategy(FrontLoaded(STEPS / full), AUTO),
        "Taylor 1, same plan as auto": Strategy(FrontLoaded(STEPS / full), Taylor(1)),
        "Chebyshev (Spectrum), same plan as auto": Strategy(FrontLoaded(STEPS / full), Chebyshev(history=100)),
        "Chebyshev, gaps n(k/K)^1.35": Strategy(GrowingGaps(STEPS / full, 1.35, None), Chebyshev(history=100)),
        "auto's predictor on even growing gaps": Strategy(GrowingGaps(STEPS / full), AUTO),
        "reuse of the hidden, same plan as auto": Strategy(FrontLoaded(STEPS / full), Reuse()),
    }
    if interval > 1:
        even, cycle = FixedInterval(interval, 3, 1), DucaCycle(interval, "c", 3, 1)
        rows |= {
            f"Taylor 1, even gaps N={interval}": Strategy(even, Taylor(1)),
            f"Taylor 2, even gaps N={interval}": Strategy(even, Taylor(2)),
            f"Chebyshev, even gaps N={interval}": Strategy(even, Chebyshev(history=100)),
            f"FORA (per sublayer) N={interval}": Strategy(cycle, Reuse(), token_share=0.0),
            f"ToCa-like (all conservative, share 0.1) N={interval}": Strategy(cycle, Reuse(), token_share=0.1),
            f"DuCa (share 0.1) N={interval}": Strategy(DucaCycle(interval, "ca", 3, 1), Reuse(), token_share=0.1),
        }
    return rows


def other_step_counts(bench: Bench) -> list[list[str]]:
    """Returns rows of auto beside fewer steps, with a reference of other numbers of steps."""
    rows = []
    for steps in (12, 20, 50):
        bench.refer_to(steps)
        for speed in (2.0, 2.8):
            full = round(steps / speed)
            rows.append(bench.row(f"{steps} steps, auto {speed:g}×", Settings(speedup=speed)))
            rows.append(bench.row(f"{steps} steps, no cache in {full}", None, full))
    return rows


def main() -> None:
    bench = Bench(PROMPTS[:4] if "--quick" in sys.argv else PROMPTS)
    header = ["setting", "full / conservative / skipped", "compute ×", "PSNR dB", "median", "SSIM"]
    sections = []
    for speed, full in SPEEDS.items():
        rows = [bench.row(name, settings, full) for name, settings in settings_at(speed, full).items()]
        sections.append(f"\n**about {speed}× ({full} full evaluations of {STEPS})**\n\n{table(header, rows)}")
    paper = {
        "FORA N=5": DucaCycle(5, "c", 3), "ToCa-like N=5": DucaCycle(5, "c", 3), "**DuCa N=5**": DucaCycle(5, "ca", 3),
    }  # fmt: skip
    rows = [bench.row(name, Strategy(p, Reuse(), token_share=0.0 if "FORA" in name else 0.1)) for name, p in paper.items()]
    sections.append(f"\n**the paper's setting: N = 5, share 0.1, 3 full steps first**\n\n{table(header, rows)}")
    sections.append(f"\n**other step counts, auto against fewer steps**\n\n{table(header, other_step_counts(bench))}")
    about = f"{len(bench.prompts)} prompts, {STEPS} euler steps, guidance {GUIDANCE}; {machine()}.\n"
    publish("quality", about + "\n".join(sections))


if __name__ == "__main__":
    main()

"""Measures what each kind of evaluation costs in one block of real width, in multiply-adds and in time, as shares of the full block.

One block of each kind of FLUX.1, Qwen-Image, Wan 2.1 14B and Z-Image, of the host's own classes with random weights, in float32 on the CPU,
with fewer tokens than a picture has. torch counts the multiply-adds, in evaluations that are not timed. Only the blocks are measured. Other
load on the machine slows everything, so shares change little with it; the least of the rounds is taken. Writes its table to
docs/families.md. `--quick` uses few tokens and writes nothing.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

from common import ROOT, machine, publish, start, table

start()
import comfy.ops
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, Plan, RunStart, Timeline, find_family
from comfyui_duca.cache_core.discovery.flops import Macs, counted
from comfyui_duca.cache_core.discovery.places import Known, Places
from comfyui_duca.cache_core.engine.linear_sites import Factors, linear_sites
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.strategy import Strategy
from torch import nn

ROUNDS, RANK, SHARE = 2, 64, 0.1
QUICK = "--quick" in sys.argv
SIDE, TEXT = (16, 32) if QUICK else (48, 128)  # rows and columns of the latent, which make 576 tokens (64 if QUICK); text tokens
FLUX = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
    "num_heads": 24, "depth": 1, "depth_single_blocks": 1, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip
WAN = {"dim": 5120, "ffn_dim": 13824, "num_heads": 40, "num_layers": 1}
Z_IMAGE = {
    "in_channels": 16, "dim": 3840, "n_layers": 1, "n_refiner_layers": 1, "n_heads": 30, "n_kv_heads": 30, "ffn_dim_multiplier": 8 / 3,
    "qk_norm": True, "cap_feat_dim": 2560, "axes_dims": [32, 48, 48], "axes_lens": [1536, 512, 512], "rope_theta": 256.0,
    "z_image_modulation": True, "time_scale": 1000.0, "pad_tokens_multiple": 32,
}  # fmt: skip


class Real(NamedTuple):
    """A model of real width.

    Args:
        title: Its name in the table.
        make: Returns the network, with one block in each of its lists.
        call: Runs one evaluation of it.
    """

    title: str
    make: Callable[..., nn.Module]
    call: Callable[[Any], torch.Tensor]


def picture(*more: int) -> torch.Tensor:
    """Returns a random latent (1, 16, …, SIDE, SIDE)."""
    return torch.randn(1, 16, *more, SIDE, SIDE)


def words(tokens: int, channels: int) -> torch.Tensor:
    """Returns random embedded text (1, tokens, channels)."""
    return torch.randn(1, tokens, channels)


T = torch.tensor([0.7])
NAMES = {Kind.CONSERVATIVE: "conservative", Kind.INCREMENTAL: "incremental", Kind.SKIPPED: "skipped"}
MODELS = (
    Real(
        "FLUX.1",
        lambda **more: Flux(**FLUX, **more),
        lambda net: net(picture(), T, words(TEXT, 4096), torch.zeros(1, 768), torch.tensor([3.5])),
    ),
    Real(
        "Qwen-Image",
        lambda **more: QwenImageTransformer2DModel(num_layers=1, **more),
        lambda net: net(picture(1), T, words(TEXT, 3584)),
    ),
    Real(
        "Wan 2.1 14B",
        lambda **more: WanModel(**WAN, **more),
        lambda net: net(torch.randn(1, 16, 4, SIDE // 2, SIDE // 2), 1000 * T, words(512, 4096)),
    ),
    Real(
        "Z-Image",
        lambda **more: NextDiT(**Z_IMAGE, **more),
        lambda net: net(picture(), T, words(TEXT, 2560), TEXT),
    ),
)


def made(real: Real) -> nn.Module:
    """Returns the network of a model with random weights, and with refiners that pass on their input."""
    network = real.make(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init).eval()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.02, 0.02)
    for refiner in (*getattr(network, "noise_refiner", ()), *getattr(network, "context_refiner", ())):
        refiner.forward = lambda x, *_args, **_kwargs: x  # not measured, and as costly as the measured blocks
    return network


class Clock:
    """Sums up what the blocks of each list take: seconds, or multiply-adds while those are counted."""

    def __init__(self, paths: Sequence[str], network: nn.Module) -> None:
        self.taken: dict[str, float] = defaultdict(float)
        self.macs: Macs | None = None
        for path in paths:
            for block in getattr(network, path):
                block.register_forward_pre_hook(lambda _module, _args, path=path: self._add(path, -1))
                block.register_forward_hook(lambda _module, _args, _result, path=path: self._add(path, 1))

    def _add(self, path: str, sign: int) -> None:
        self.taken[path] += sign * (time.perf_counter() if self.macs is None else self.macs.so_far)

    def of(self, work: Callable[[], Any], is_counted: bool = False) -> dict[str, float]:
        """Returns what the blocks of each list take in `work`, by the list's path: seconds, or multiply-adds if `is_counted`."""
        self.taken.clear()
        with counted() if is_counted else nullcontext() as self.macs:
            work()
        return dict(self.taken)


class Evaluations:
    """Runs one network in every kind of evaluation that it can do.

    Attributes:
        known: What was found out about the network.
        paths: Paths of the lists whose blocks are measured.
        cycle: Plan with one step of every kind that the network can do.
    """

    def __init__(self, real: Real, network: nn.Module) -> None:
        self.real, self.network, self.family, self.places = real, network, find_family(network), Places()
        self.run_of("Fa", lambda _kind, work: work())
        self.known: Known = self.places.latest(network)
        self.paths = [passed.path for passed in self.known.place.passed if "refiner" not in passed.path]
        self.cycle = "F" + "c" * self.family.is_conservative + "i" + "a"

    def run_of(self, plan: str, on_evaluation: Callable[[str, Callable[[], Any]], Any]) -> None:
        """Carries out one run.

        Args:
            plan: Its plan, one letter per step.
            on_evaluation: Is called for every evaluation with its kind and a function that carries it out.
        """
        steps, factors = len(plan), self.factors() if "i" in plan else None
        strategy = Strategy(Given(Plan.parse(plan)), AUTO, SHARE, factors=factors)
        timeline = Timeline([1 - i / steps for i in range(steps + 1)])
        run = CacheRun(strategy, RunStart(self.network, self.family, timeline, range(steps), places=self.places))

        def evaluate(step: int) -> None:
            with run.evaluation(1 - step / steps):
                run.cond_batch()
                run.model_call(ModelCall(self.network, ("cond",), 0), self.compute)

        for step, kind in enumerate(plan):
            on_evaluation(kind, lambda step=step: evaluate(step))
        report = run.close(is_complete=True)
        assert "".join(e.kind.value for e in report.evaluations) == plan and not report.notices, report.notices

    def compute(self) -> torch.Tensor:
        """Runs the network once, always on the same input."""
        torch.manual_seed(0)  # a proof runs a call again, and must find the same input
        return self.real.call(self.network)

    def factors(self) -> Factors:
        """Returns random low-rank factors of rank RANK for every linear layer that can use them."""
        sites = linear_sites(self.family, self.known.layer_calls, self.network)
        sizes = [(site.key(part), site.outputs(part), site.in_features) for site in sites for part in site.parts]
        made = {f"{key}.A": 0.02 * torch.randn(outputs, RANK) for key, outputs, _ in sizes}
        return made | {f"{key}.B": 0.02 * torch.randn(RANK, inputs) for key, _, inputs in sizes}

    def least(self, is_counted: bool) -> dict[str, dict[str, float]]:
        """Returns the least of all rounds by kind ("" without a cache) and by list: seconds, or multiply-adds if `is_counted`."""
        clock, best = Clock(self.paths, self.network), dict[str, dict[str, float]]()
        rounds = 1 if QUICK or is_counted else ROUNDS

        def on_evaluation(kind: str, work: Callable[[], Any]) -> None:
            keep_least(best, kind, clock.of(work, is_counted))

        self.run_of(self.cycle, lambda _kind, work: work())  # proves the place, and counts what it must
        for _ in range(rounds):
            keep_least(best, "", clock.of(self.compute, is_counted))
        self.run_of("F" + self.cycle * rounds, on_evaluation)
        return best


def keep_least(best: dict[str, dict[str, float]], kind: str, taken: Mapping[str, float]) -> None:
    """Lowers the values of a kind in `best` to those in `taken` that are less."""
    before = best.setdefault(kind, dict(taken))
    for path, value in taken.items():
        before[path] = min(before[path], value)


@torch.inference_mode()
def rows(real: Real) -> list[list[str]]:
    """Returns the table's rows of one model, one per list of blocks and kind of evaluation."""
    evaluations = Evaluations(real, made(real))
    macs, seconds = evaluations.least(is_counted=True), evaluations.least(is_counted=False)
    print(real.title, {kind: dict(value) for kind, value in seconds.items()}, flush=True)
    found = []
    for path in evaluations.paths:
        for kind in (Kind.CONSERVATIVE, Kind.INCREMENTAL, Kind.SKIPPED):
            if kind.value in seconds:
                shares = [taken[kind.value][path] / taken[""][path] for taken in (macs, seconds)]
                found.append([f"{real.title}, {path}", NAMES[kind], *(f"{share:.3f}" for share in shares)])
    return found


def main() -> None:
    header = ["block", "evaluation", "counted", "measured"]
    text = table(header, [row for real in MODELS for row in rows(real)])
    about = (
        f"Shares of one full block without a cache, float32; conservative with a token share of {SHARE:g}, low-rank at rank {RANK}, "
        f"skipped with auto's forecast; {(SIDE // 2) ** 2} image tokens; the least of {ROUNDS} rounds; {machine()}."
    )
    if QUICK:
        print(text)
    else:
        publish("real_width", f"{about}\n\n{text}", ROOT / "docs" / "families.md")


if __name__ == "__main__":
    main()

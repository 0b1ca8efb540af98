"""What each kind of evaluation costs in one block of real width: counted multiply-adds and measured time, as shares of the block itself.

One block of each kind of FLUX.1, Qwen-Image, Wan 2.1 14B and Z-Image, of the host's own classes with random weights, in float32 on the CPU,
with fewer tokens than a picture has; what the shares are counted to be with all of them stands beside it. Only the blocks are timed.
Shares change little with other load on the machine, which slows everything; the least of the rounds is taken. Writes its table to
docs/families.md. `--quick` tries it out on few tokens and writes nothing.
"""

from __future__ import annotations

import sys
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from common import ROOT, machine, publish, start, table

start()
import comfy.ops
import torch
from comfy.ldm.flux.model import Flux
from comfy.ldm.lumina.model import NextDiT
from comfy.ldm.qwen_image.model import QwenImageTransformer2DModel
from comfy.ldm.wan.model import WanModel
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, Plan, Timeline, find_family
from comfyui_duca.cache_core.engine.linear_sites import CalibratedLinears, dense_macs, find_linears, icc_macs
from comfyui_duca.cache_core.families import ModelFamily
from comfyui_duca.cache_core.policies import Given
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.strategy import Strategy
from torch import nn

ROUNDS, RANK, SHARE = 2, 64, 0.1
QUICK = "--quick" in sys.argv
SIDE, TEXT = (16, 32) if QUICK else (48, 128)  # of the latent: 576 tokens
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
    """make: the network, of one block each. call: one evaluation of it. usual: the tokens of a picture or a video in full."""

    title: str
    make: Callable[..., nn.Module]
    call: Callable[[Any], torch.Tensor]
    usual: Mapping[str, int]


def picture(*more: int) -> torch.Tensor:
    return torch.randn(1, 16, *more, SIDE, SIDE)


def words(tokens: int, channels: int) -> torch.Tensor:
    return torch.randn(1, tokens, channels)


T = torch.tensor([0.7])
NAMES = {Kind.CONSERVATIVE: "conservative", Kind.CALIBRATED: "low-rank", Kind.AGGRESSIVE: "aggressive"}
MODELS = (
    Real(
        "FLUX.1",
        lambda **more: Flux(**FLUX, **more),
        lambda net: net(picture(), T, words(TEXT, 4096), torch.zeros(1, 768), torch.tensor([3.5])),
        {"img": 4096, "txt": 512},
    ),
    Real(
        "Qwen-Image",
        lambda **more: QwenImageTransformer2DModel(num_layers=1, **more),
        lambda net: net(picture(1), T, words(TEXT, 3584)),
        {"img": 6889, "txt": 256},  # 1328 x 1328
    ),
    Real(
        "Wan 2.1 14B",
        lambda **more: WanModel(**WAN, **more),
        lambda net: net(torch.randn(1, 16, 4, SIDE // 2, SIDE // 2), 1000 * T, words(512, 4096)),
        {"img": 32760, "txt": 512},  # 832 x 480, 81 frames
    ),
    Real(
        "Z-Image",
        lambda **more: NextDiT(**Z_IMAGE, **more),
        lambda net: net(picture(), T, words(TEXT, 2560), TEXT),
        {"img": 4096, "txt": 128, "padding": 0},
    ),
)


def made(real: Real) -> nn.Module:
    network = real.make(dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init).eval()
    for parameter in network.parameters():
        nn.init.uniform_(parameter, -0.02, 0.02)
    for refiner in (*getattr(network, "noise_refiner", ()), *getattr(network, "context_refiner", ())):
        refiner.forward = lambda x, *_args, **_kwargs: x  # beside the blocks that are timed, and as dear as they
    return network


class Clock:
    """Seconds that every block took since `clear`, by its stack."""

    def __init__(self, family: ModelFamily, network: nn.Module) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        for stack, _, block in family.placed(network):
            block.register_forward_pre_hook(lambda _module, _args, path=stack.path: self._add(path, -time.perf_counter()))
            block.register_forward_hook(lambda _module, _args, _result, path=stack.path: self._add(path, time.perf_counter()))

    def _add(self, path: str, seconds: float) -> None:
        self.seconds[path] += seconds

    def of(self, work: Callable[[], Any]) -> dict[str, float]:
        self.seconds.clear()
        work()
        return dict(self.seconds)


def measured(real: Real, family: ModelFamily, network: nn.Module) -> tuple[dict[str, dict[str, float]], Mapping[str, int]]:
    """The least seconds of every kind ("" for the block without a cache) in each stack, and the tokens."""
    cycle = "F" + "c" * family.is_conservative + "i" * bool(family.linears) + "a"
    rounds = 1 if QUICK else ROUNDS
    plan, linears = Plan.parse(cycle * rounds), factors(family, network) if family.linears else None
    steps = len(plan)
    timeline = Timeline([1 - i / steps for i in range(steps + 1)])
    strategy = Strategy(Given(plan), AUTO, SHARE, linears=linears)
    run, clock = CacheRun(strategy, timeline, range(steps), family, torch.device("cpu")), Clock(family, network)

    def compute() -> torch.Tensor:
        return real.call(network)

    def evaluate(step: int) -> None:
        with run.evaluation(1 - step / steps):
            run.cond_batch()
            run.model_call(ModelCall(network, ("cond",), 0), compute)

    best: dict[str, dict[str, float]] = {}
    for step, kind in enumerate(str(plan)):
        if kind == "F":
            keep_least(best, "", clock.of(compute))
        keep_least(best, kind, clock.of(lambda step=step: evaluate(step)))
    report = run.close(is_complete=True)
    assert "".join(e.kind.value for e in report.evaluations) == str(plan) and not report.notices, report.notices
    return best, report.shape.lengths


def keep_least(best: dict[str, dict[str, float]], kind: str, seconds: Mapping[str, float]) -> None:
    before = best.setdefault(kind, dict(seconds))
    for path, value in seconds.items():
        before[path] = min(before[path], value)


def factors(family: ModelFamily, network: nn.Module) -> CalibratedLinears:
    sizes = [(site.key(part), site.outputs(part), site.in_features) for site in find_linears(family, network) for part in site.parts]
    made = {f"{key}.A": 0.02 * torch.randn(outputs, RANK) for key, outputs, _ in sizes}
    made |= {f"{key}.B": 0.02 * torch.randn(RANK, inputs) for key, _, inputs in sizes}
    return CalibratedLinears.bind(family, network, made)


def counted(family: ModelFamily, network: nn.Module, path: str, lengths: Mapping[str, int]) -> dict[str, float]:
    """Multiply-adds of the blocks of one stack in every kind of evaluation, as a share of those in full."""
    others = {stack.path: getattr(network, stack.path) for stack in family.stacks if stack.path != path}
    for other in others:
        setattr(network, other, nn.ModuleList())
    try:
        full = family.macs(network, lengths, Kind.FULL, SHARE)
        shares = {"a": 0.0}
        if family.is_conservative:
            shares["c"] = family.macs(network, lengths, Kind.CONSERVATIVE, SHARE) / full
        if family.linears:
            sites = find_linears(family, network)
            shares["i"] = 1 + (icc_macs(sites, lengths, RANK) - dense_macs(sites, lengths)) / full
        return shares
    finally:
        for other, blocks in others.items():
            setattr(network, other, blocks)


@torch.inference_mode()
def rows(real: Real) -> list[list[str]]:
    network = made(real)
    family = find_family(network)
    assert family is not None
    seconds, lengths = measured(real, family, network)
    print(real.title, said(lengths), {kind: dict(value) for kind, value in seconds.items()}, flush=True)
    found = []
    for stack in family.stacks:
        here, usual = (counted(family, network, stack.path, tokens) for tokens in (lengths, real.usual))
        for kind in (Kind.CONSERVATIVE, Kind.CALIBRATED, Kind.AGGRESSIVE):
            if kind.value in here:
                share = seconds[kind.value][stack.path] / seconds[""][stack.path]
                cells = [f"{here[kind.value]:.3f}", f"{share:.3f}", f"{usual[kind.value]:.3f}"]
                found.append([f"{real.title}, {stack.path}", NAMES[kind], *cells, said(lengths), said(real.usual)])
    return found


def said(lengths: Mapping[str, int]) -> str:
    return " + ".join(f"{n} {name}" for name, n in sorted(lengths.items()) if n)


def main() -> None:
    header = ["block", "evaluation", "counted", "measured", "counted in full size", "tokens", "in full size"]
    text = table(header, [row for real in MODELS for row in rows(real)])
    about = (
        f"Shares of one full block without a cache, float32; conservative with a token share of {SHARE:g}, low-rank at rank {RANK}, "
        f"aggressive with auto's forecast; the least of {ROUNDS} rounds; {machine()}."
    )
    if QUICK:
        print(text)
    else:
        publish("real_width", f"{about}\n\n{text}", ROOT / "docs" / "families.md")


if __name__ == "__main__":
    main()

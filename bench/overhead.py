"""Measures the time that the cache adds to FLUX blocks of real width, as shares of the time of a plain full evaluation.

The network is the host's own Flux class with 1 double and 2 single blocks of width 3072, random weights and bfloat16. It is called with
1024 image and 256 text tokens. The order of the variants rotates from round to round. Every time is the lower quartile over the rounds,
because other load on the machine can only make a time longer. The table is written to docs/benchmarks.md.
"""

from __future__ import annotations

import statistics
import sys
import time
from functools import partial

from common import machine, publish, start, table

start()
import comfy.ops
import torch
from comfy.ldm.flux.model import Flux
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, Places, RunStart, Timeline
from comfyui_duca.cache_core.discovery.places import Known
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.overrides import forward_overrides
from comfyui_duca.cache_core.planning.plan import Plan
from comfyui_duca.cache_core.predictors import Chebyshev, Reuse
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes.page.plan_preview import preview

ROUNDS = 24
CONFIG = {
    "in_channels": 16, "out_channels": 16, "vec_in_dim": 768, "context_in_dim": 4096, "hidden_size": 3072, "mlp_ratio": 4.0,
    "num_heads": 24, "depth": 1, "depth_single_blocks": 2, "axes_dim": [16, 56, 56], "theta": 10000, "patch_size": 2,
    "qkv_bias": True, "guidance_embed": True,
}  # fmt: skip


class Planned:
    """A policy with a fixed plan.

    Args:
        text: One letter for the kind of each step.
    """

    def __init__(self, text: str) -> None:
        self.text = text

    def plan(self, steps: int, window: range) -> Plan:
        """Returns the fixed plan."""
        return Plan.parse(self.text)


def make_network(config: dict = CONFIG) -> Flux:
    """Makes the host's Flux network in bfloat16, with the same random weights at every call."""
    torch.manual_seed(0)
    network = Flux(**config, dtype=torch.bfloat16, device="cpu", operations=comfy.ops.disable_weight_init)
    for parameter in network.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    return network.eval()


class Overhead:
    """Times evaluations of one network.

    Attributes:
        config: Arguments of the network.
        latent: Height and width of the latent. 2x2 of its values make a token.
        text: Number of text tokens.
    """

    config = CONFIG
    latent, text = 64, 256

    def __init__(self) -> None:
        self.network = make_network(self.config)
        self.x = torch.randn(1, 16, self.latent, self.latent, dtype=torch.bfloat16)
        self.context, self.y = torch.randn(1, self.text, 4096, dtype=torch.bfloat16), torch.randn(1, 768, dtype=torch.bfloat16)

    def compute(self) -> torch.Tensor:
        """Runs the network once."""
        t = torch.tensor([0.7], dtype=torch.bfloat16)
        return self.network(self.x, t, self.context, self.y, torch.tensor([3.5], dtype=torch.bfloat16))

    def run(self, plan: str, predictor, share: float = 0.1) -> CacheRun:
        """Opens a run.

        Args:
            plan: One letter for the kind of each step.
            predictor: Fills skipped evaluations.
            share: Share 0..1 of the tokens that conservative evaluations recompute.
        """
        steps = len(plan)
        timeline = Timeline([1 - i / steps for i in range(steps + 1)])
        return CacheRun(Strategy(Planned(plan), predictor, share), RunStart(self.network, FLUX, timeline, range(steps)))

    def known(self) -> Known:
        """Returns the place and the costs that a run finds for the network."""
        places = Places()
        run = CacheRun(
            Strategy(Planned("Fa"), Reuse()),
            RunStart(self.network, FLUX, Timeline([1.0, 0.5, 0.0]), range(2), places=places),
        )
        self.evaluate(run, 0)
        found = places.latest(self.network)
        assert found is not None
        return found

    def timed(self, work) -> float:
        """Calls `work` and returns the seconds that it took."""
        begin = time.perf_counter()
        work()
        return time.perf_counter() - begin

    def evaluate(self, run: CacheRun, step: int) -> float:
        """Runs one evaluation with the cache and returns its seconds, with everything that the cache does before and after the call."""
        call = ModelCall(self.network, ("cond",), 0)

        def work():
            with run.evaluation(1 - step / len(run.plan)):
                run.cond_batch()
                run.model_call(call, self.compute)

        return self.timed(work)

    def planned(self) -> float:
        """Returns the seconds of making a plan of 200 steps, as the page does whenever a slider moves."""
        return self.timed(partial(preview, {"sampling": {"steps": 200}, "cache": {"speedup": 3.0}}))

    def passed_through(self) -> float:
        """Returns the seconds of the host's embedding and head alone, with blocks that return their input."""
        blocks = [(b, lambda _f: lambda img, txt, **_: (img, txt)) for b in self.network.double_blocks]
        blocks += [(b, lambda _f: lambda x, **_: x) for b in self.network.single_blocks]
        with forward_overrides(blocks):
            return self.timed(self.compute)

    def measure(self, rounds: int) -> dict[str, list[float]]:
        """Returns the seconds of every variant in every round."""
        names = ("plain", "floor", "plan", "full", "full, sublayers kept", "skipped", "conservative")
        times: dict[str, list[float]] = {name: [] for name in names}
        forecast = self.run("F" * 5 + "Fa" * (rounds + 1), Chebyshev(taylor_share=0.7, history=5))
        cycle = self.run("F" + "Fc" * (rounds + 1), Reuse())
        for step in range(5):  # fills the predictor's history and warms up the allocators
            self.evaluate(forecast, step)
        self.evaluate(cycle, 0)
        for i in range(rounds):
            groups = [
                [("plain", partial(self.timed, self.compute)), ("floor", self.passed_through), ("plan", self.planned)],
                [("full", partial(self.evaluate, forecast, 5 + 2 * i)), ("skipped", partial(self.evaluate, forecast, 6 + 2 * i))],
                [
                    ("full, sublayers kept", partial(self.evaluate, cycle, 1 + 2 * i)),
                    ("conservative", partial(self.evaluate, cycle, 2 + 2 * i)),
                ],
            ]
            for name, measure in (entry for group in groups[i % 3 :] + groups[: i % 3] for entry in group):
                times[name].append(measure())
            print(f"round {i + 1} of {rounds}", {k: round(v[-1], 3) for k, v in times.items()}, flush=True)
        assert [e.kind for e in forecast.report.evaluations[5:7]] == [Kind.FULL, Kind.SKIPPED]
        assert cycle.report.evaluations[2].kind is Kind.CONSERVATIVE
        return times


@torch.inference_mode()
def main() -> None:
    """Measures all variants and writes the table. `--quick` takes 3 rounds."""
    bench = Overhead()
    times = bench.measure(3 if "--quick" in sys.argv else ROUNDS)
    quartile = {name: statistics.quantiles(values, n=4)[0] for name, values in times.items()}

    def share(name: str, minus: str | None = None) -> float:
        """Returns the time of a variant, less that of `minus`, as a share of a plain full evaluation, in percent."""
        return 100 * (quartile[name] - (quartile[minus] if minus else 0.0)) / quartile["plain"]

    rows = [
        ["full evaluation, forecast mode: slower than without", f"{share('full', 'plain'):+.2f} %", "≤ 2 %"],
        ["full evaluation, paper mode (sublayers kept): slower than without", f"{share('full, sublayers kept', 'plain'):+.2f} %", "≤ 2 %"],
        ["skipped evaluation beyond embedding and head", f"{share('skipped', 'floor'):.2f} %", "≤ 3 %"],
        ["skipped evaluation, all of it", f"{share('skipped'):.2f} %", ""],
        ["conservative evaluation (share 0.1), all of it", f"{share('conservative'):.2f} %", ""],
        ["a plan of 200 steps for the page", f"{share('plan'):.2f} %", "≤ 3 %"],
    ]
    plain = times["plain"]
    spread = 100 * (max(plain) - min(plain)) / statistics.median(plain)
    base = f"({quartile['plain']:.2f} s; all rounds spread over {spread:.0f} %)"
    about = f"Lower quartile of {len(plain)} rounds, as shares of a plain full evaluation {base}; {machine()}."
    publish("overhead", f"{about}\n\n{table(['what', 'measured', 'target'], rows)}")


if __name__ == "__main__":
    main()

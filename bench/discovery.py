"""What finding and proving a place costs, on FLUX blocks of real width: times as ratios in one run.

1 double and 2 single blocks, width 3072, random weights, 1024 image and 256 text tokens, bfloat16, through the host's own Flux class.
Every round uses the network plainly, in a run that has to find its place (once per network and size in a process), and in one that only
has to prove it (the first evaluation of every later run). Writes its table to docs/benchmarks.md.
"""

from __future__ import annotations

import statistics
import sys
from functools import partial

from common import machine, publish, start, table

start()
import torch
from comfyui_duca.cache_core import CacheRun, ModelCall, Plan, Timeline
from comfyui_duca.cache_core.discovery.places import Places
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.policies import Given
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.strategy import Strategy
from overhead import Overhead

ROUNDS = 12
BLOCKS, REAL = 3, 57  # of the bench's network, and of FLUX.1


class Counting(Overhead):
    """Also counts how often the network is called."""

    calls = 0

    def compute(self) -> torch.Tensor:
        self.calls += 1
        return super().compute()

    def first_evaluation(self, places: Places) -> tuple[float, int]:
        """Seconds of the first, full evaluation of a run, and how often it called the network."""
        plan = Plan.parse("Fa")
        run = CacheRun(Strategy(Given(plan), AUTO), Timeline([1.0, 0.5, 0.0]), range(2), FLUX, torch.device("cpu"), places=places)
        before = self.calls

        def work() -> None:
            with run.evaluation(1.0):
                run.cond_batch()
                run.model_call(ModelCall(self.network, ("cond",), 0), self.compute)

        seconds = self.timed(work)
        assert run.close(is_complete=True).place.startswith("found and proved")
        return seconds, self.calls - before


@torch.inference_mode()
def main() -> None:
    bench, rounds = Counting(), 2 if "--quick" in sys.argv else ROUNDS
    known = Places()
    _, tries = bench.first_evaluation(known)
    times: dict[str, list[float]] = {name: [] for name in ("plain", "skip", "found", "proved")}
    for number in range(rounds):
        measures = [
            ("plain", partial(bench.timed, bench.compute)),
            ("skip", bench.passed_through),
            ("found", lambda: bench.first_evaluation(Places())[0]),
            ("proved", lambda: bench.first_evaluation(known)[0]),
        ]
        for name, measure in measures[number % 4 :] + measures[: number % 4]:
            times[name].append(measure())
        print(f"round {number + 1} of {rounds}", {name: round(values[-1], 3) for name, values in times.items()}, flush=True)
    least = {name: statistics.quantiles(values, n=4)[0] if len(values) > 2 else min(values) for name, values in times.items()}
    plain, skip = least["plain"], least["skip"]
    found, proved = least["found"] - plain, least["proved"] - plain
    watching = found - (tries - 1) * skip  # the skips cost as much on a deeper network, watching as much more as that has more blocks
    real = plain - skip + (plain - skip) * (REAL - BLOCKS) / BLOCKS + skip

    def percent(seconds: float, base: float) -> str:
        return f"{100 * seconds / base:.2f} %"

    rows = [
        ["proof, once a run: one skip", percent(proved, plain), percent(proved, real)],
        [f"finding the place, once a size in a process: watching and {tries - 1} skips", percent(found, plain),
         percent(watching * REAL / BLOCKS + (tries - 1) * skip, real)],
        ["of that, watching and counting", percent(watching, plain), percent(watching * REAL / BLOCKS, real)],
    ]  # fmt: skip
    about = (
        f"As shares of a plain full evaluation ({plain:.2f} s) of these {BLOCKS} blocks, and reckoned for {REAL}; "
        f"lower quartile of {rounds} rounds; {machine()}."
    )
    publish("discovery", f"{about}\n\n{table(['what', f'{BLOCKS} blocks', f'{REAL} blocks'], rows)}")


if __name__ == "__main__":
    main()

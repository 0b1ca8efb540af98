"""Measures what finding and proving a place costs on FLUX blocks of real width, as ratios of times in one run.

1 double and 2 single blocks, width 3072, random weights, 1024 image and 256 text tokens, bfloat16, through the host's own Flux class.
Every round runs the network three times: without a cache, in a run that has to find its place (once per network and size in a process)
and in a run that only has to prove it (the first evaluation of every later run). On two shared processors such times vary by more than the
differences between them. So each part is also measured separately, where it makes up most of the time: skips; the Python code of watching,
on blocks of width 128, which run as many operations; and copies. Writes its table to docs/benchmarks.md.
"""

from __future__ import annotations

import statistics
import sys
import time
from contextlib import nullcontext
from functools import partial

from common import machine, publish, start, table

start()
import torch
from comfyui_duca.cache_core import CacheRun, ModelCall, Plan, RunStart, Timeline
from comfyui_duca.cache_core.discovery.layers import linear_layers
from comfyui_duca.cache_core.discovery.places import Places
from comfyui_duca.cache_core.discovery.watch import lists_of, watching
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.predictors import AUTO
from comfyui_duca.cache_core.strategy import Strategy
from overhead import CONFIG, Overhead

ROUNDS = 12
SMALL_ROUNDS = 100
BLOCKS, REAL = 3, 57  # numbers of blocks: of the benchmark's network, and of FLUX.1


class Finding(Overhead):
    """Times first evaluations and counts how often they call the network."""

    calls = 0

    def compute(self) -> torch.Tensor:
        self.calls += 1
        return super().compute()

    def first_evaluation(self, places: Places) -> tuple[float, int]:
        """Returns the seconds of a run's first evaluation, which is full, and how often it called the network."""
        plan = Plan.parse("Fa")
        run = CacheRun(
            Strategy(Given(plan), AUTO),
            RunStart(self.network, FLUX, Timeline([1.0, 0.5, 0.0]), range(2), places=places),
        )
        before = self.calls

        def work() -> None:
            with run.evaluation(1.0):
                run.cond_batch()
                run.model_call(ModelCall(self.network, ("cond",), 0), self.compute)

        seconds = self.timed(work)
        assert run.close(is_complete=True).place.startswith("found and proved")
        return seconds, self.calls - before

    def watched(self) -> float:
        """Returns the seconds of a full evaluation that is watched as in a run, without the skips that prove a place."""
        layers = {key: layer for path, blocks in lists_of(self.network).items() for key, layer in linear_layers(path, blocks)}

        def work() -> None:
            with watching(self.network, layers, nullcontext):
                self.compute()

        return self.timed(work)


SMALL = {**CONFIG, "hidden_size": 128, "num_heads": 1}


class SmallFinding(Finding):
    """Runs the same operations on blocks so small that computing takes next to no time."""

    config = SMALL
    latent, text = 4, 4


def least(times: list[float]) -> float:
    """Returns the lower quartile of times, to which other load on the machine has added least; the minimum of fewer than three."""
    return statistics.quantiles(times, n=4)[0] if len(times) > 2 else min(times)


def watching_python(rounds: int) -> float:
    """Returns the seconds that watching adds to each block, without copies."""
    small = SmallFinding()
    pairs = [(small.timed(small.compute), small.watched()) for _ in range(rounds)]
    return (least([watched for _, watched in pairs]) - least([plain for plain, _ in pairs])) / BLOCKS


def copying(rounds: int) -> float:
    """Returns the seconds that copying the output of one block takes."""
    hidden = torch.randn(1, 1024 + 256, CONFIG["hidden_size"], dtype=torch.bfloat16)
    into = hidden.clone()

    def copy() -> float:
        begin = time.perf_counter()
        into.copy_(hidden)
        return time.perf_counter() - begin

    return least([copy() for _ in range(rounds)])


@torch.inference_mode()
def main() -> None:
    bench, is_quick = Finding(), "--quick" in sys.argv
    rounds, small_rounds = (2, 5) if is_quick else (ROUNDS, SMALL_ROUNDS)
    known = Places()
    tries = bench.first_evaluation(known)[1] - 1
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
    plain, skip = least(times["plain"]), least(times["skip"])
    python, copy = watching_python(small_rounds), copying(small_rounds)

    def parts(blocks: int) -> dict[str, float]:
        """Returns each part's share of a plain full evaluation of so many blocks. The outputs of the last half of them are copied."""
        full = skip + (plain - skip) * blocks / BLOCKS
        seconds = {"skip": skip, "tries": tries * skip, "python": python * blocks, "copies": copy * blocks / 2}
        return {name: value / full for name, value in seconds.items()} | {"finding": sum(seconds.values()) / full - skip / full}

    def direct(name: str) -> str:
        return f"{100 * (least(times[name]) / plain - 1):+.1f} %"

    few, many = parts(BLOCKS), parts(REAL)
    rows = [
        ["proof, once a run: one skip", f"{few['skip']:.2%}", f"{many['skip']:.2%}", direct("proved")],
        ["finding the place, once a size in a process", f"{few['finding']:.2%}", f"{many['finding']:.2%}", direct("found")],
        [f"of that, {tries} skips", f"{few['tries']:.2%}", f"{many['tries']:.2%}", ""],
        [f"of that, the Python of watching, {1000 * python:.1f} ms a block", f"{few['python']:.2%}", f"{many['python']:.2%}", ""],
        ["of that, copies", f"{few['copies']:.2%}", f"{many['copies']:.2%}", ""],
    ]
    spread = statistics.quantiles(times["plain"], n=4)
    about = (
        f"As shares of a plain full evaluation ({plain:.2f} s) of these {BLOCKS} blocks, and reckoned for {REAL}, from parts measured one "
        f"by one; the last column is the whole evaluation timed, of which the middle half of {rounds} plain rounds lay "
        f"{100 * (spread[2] / spread[0] - 1):.0f} % apart; lower quartiles; {machine()}."
    )
    publish("discovery", f"{about}\n\n{table(['what', f'{BLOCKS} blocks', f'{REAL} blocks', f'{BLOCKS} blocks, timed whole'], rows)}")


if __name__ == "__main__":
    main()

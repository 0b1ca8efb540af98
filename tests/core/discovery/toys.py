"""Small transformers that no file describes, and a driver that runs them with a cache as a host would.

The reference never asks the cache where a place is. It runs all blocks; in skipped evaluations a hook on the block that the test names
returns what that block returned in the last full evaluation.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, Plan, RunStart, Timeline, find_family
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Strategy
from torch import Tensor, nn
from torch.nn import functional

WIDTH, CHANNELS, TOKENS = 16, 4, 12
PLAN = "FaaFaF"


class Block(nn.Module):
    """A block of attention and an MLP, both modulated."""

    def __init__(self, width: int = WIDTH) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Linear(width, width)

    def change(self, h: Tensor, c: Tensor) -> Tensor:
        """Returns what the block adds to h (B, L, C). c is (B, C)."""
        scale = self.scale(c)[:, None]
        q, k, v = self.qkv(functional.layer_norm(h, h.shape[-1:]) * (1 + scale)).chunk(3, -1)
        h = self.out(functional.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0])
        return h + self.down(functional.gelu(self.up(functional.layer_norm(h, h.shape[-1:])))) * (1 + scale)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        return h + self.change(h, c)


class Toy(nn.Module):
    """Maps x (B, L, 4), t (B,) and context (B, M, C) to (B, L, 4). Tests override parts of it."""

    def __init__(self, depth: int = 4) -> None:
        super().__init__()
        torch.manual_seed(7)
        self.embed, self.time = nn.Linear(CHANNELS, WIDTH), nn.Linear(2, WIDTH)
        self.blocks: Any = nn.ModuleList(Block() for _ in range(depth))
        self.shift, self.unembed = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, CHANNELS)
        self.build()
        for parameter in self.parameters():
            parameter.requires_grad_(False)

    def build(self) -> None:
        """Makes the modules that a test needs."""

    def forward(self, x: Tensor, t: Tensor, context: Tensor) -> Any:
        c = self.condition(t, context)
        return self.head(self.middle(self.embed(x), c, context, t), c, t)

    def condition(self, t: Tensor, context: Tensor) -> Tensor:
        return functional.silu(self.time(torch.stack((t, (7 * t).sin()), 1)) + context.mean(1))

    def middle(self, h: Tensor, c: Tensor, context: Tensor, t: Tensor) -> Tensor:
        for block in self.blocks:
            h = block(h, c)
        return h

    def head(self, h: Tensor, c: Tensor, t: Tensor) -> Tensor:
        return self.unembed(functional.layer_norm(h, h.shape[-1:]) + self.shift(c)[:, None])


class At(Toy):
    """Knows its step: 1 - t is the share of the run that is done."""

    steps = len(PLAN)

    def step(self, t) -> int:
        return round((1 - float(t[0])) * self.steps)


def seeded(*seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(sum(100**i * (part + 1) for i, part in enumerate(seed)))


def latent(step: int, tokens: int = TOKENS) -> Tensor:
    """Returns a latent (1, L, 4) as a sampler has it: a fixed picture, and noise that decreases with the steps."""
    return torch.randn(1, tokens, CHANNELS, generator=seeded(1)) + (1 - step / 8) * torch.randn(1, tokens, CHANNELS, generator=seeded(2))


def text_of(cond: int, tokens: int = 5) -> Tensor:
    return torch.randn(1, tokens, WIDTH, generator=seeded(3, cond))


def plainly(network: nn.Module, step: int, conds: Sequence[int], plan: str) -> Any:
    """Calls a network as most toys are called: all conds see the same latent."""
    x = latent(step).repeat(len(conds), 1, 1)
    return network(x, torch.full((len(conds),), 1 - step / len(plan)), torch.cat([text_of(cond) for cond in conds]))


@dataclass
class Case:
    """A toy and what the cache is expected to find in it.

    Args:
        make: Makes the network.
        answers: Path of the block whose result is kept; "" for the whole output; None if nothing may be cached.
        passed: The lists that a skip must leave out.
        reason: A part of the notice that says why there is no place.
        call: Calls the network, from (network, step, conds, plan).
        is_joint: Whether the reference, too, must be called with all conds at once.
        signature: Returns a call's signature for its conds, as a host would make it.
        tolerance: Largest difference from the reference, in units of the answer's standard deviation.
    """

    make: Callable[[], nn.Module]
    answers: str | None
    passed: tuple[str, ...] = ("blocks",)
    reason: str = ""
    call: Callable[[nn.Module, int, Sequence[int], str], Any] = plainly
    is_joint: bool = False
    signature: Callable[[Sequence[int]], Hashable] = lambda _conds: (1, TOKENS)
    tolerance: float = 1e-5


TOGETHER, APART = ((0, 1),), ((0,), (1,))
ORDERS: dict[str, Callable[[int], Sequence[Sequence[int]]]] = {
    "together": lambda _step: TOGETHER,
    "apart": lambda _step: APART,
    "both": lambda step: (TOGETHER, APART, APART, APART, ((1, 0),), TOGETHER)[step % 6],
}


@dataclass
class Driven:
    """What happened in a run. All lists have one entry for each step.

    Args:
        run: The finished run.
        answers: By cond.
        ran: The conds for which any block ran.
        tries: Number of calls of the network.
        noise: State of torch's random numbers after the step.
        notices: What a user would read.
    """

    run: CacheRun
    answers: list[dict[int, Any]] = field(default_factory=list)
    ran: list[set[int]] = field(default_factory=list)
    tries: list[int] = field(default_factory=list)
    noise: list[Tensor] = field(default_factory=list)
    notices: list[str] = field(default_factory=list)


def parts_of(answer: Any, conds: Sequence[int]) -> dict[int, Any]:
    if isinstance(answer, Tensor):
        return dict(zip(conds, answer.chunk(len(conds))))
    return dict(zip(conds, zip(*(tensor.chunk(len(conds)) for tensor in answer))))


@torch.inference_mode()
def driven(case: Case, network: nn.Module, order: str = "together", plan: str = PLAN, is_cached: bool = True) -> Driven:
    """Runs a plan, with or without a cache, and returns what happened. Random numbers are seeded at every step."""
    steps = len(plan)
    strategy = Strategy(Given(Plan.parse(plan)), Reuse())
    run = CacheRun(
        strategy,
        RunStart(network, find_family(network), Timeline([1 - i / steps for i in range(steps + 1)]), range(steps)),
    )
    result, ran, count = Driven(run), set[int](), [0]
    watched = [block for path in case.passed for block in attrgetter(path)(network).modules() if isinstance(block, nn.Linear)]
    hooks = [linear.register_forward_hook(lambda *_: ran.update(now)) for linear in watched]
    for step in range(steps):
        torch.manual_seed(step)
        answers: dict[int, Any] = {}
        result.ran.append(set())
        count[0] = 0
        with run.evaluation(1 - step / steps):
            run.cond_batch()
            for conds in ORDERS[order](step):
                now = conds
                ran.clear()

                def compute(conds=conds, step=step) -> Any:
                    count[0] += 1
                    return case.call(network, step, conds, plan)

                if is_cached:
                    answers |= parts_of(run.model_call(ModelCall(network, conds, case.signature(conds)), compute), conds)
                else:
                    answers |= parts_of(compute(), conds)
                result.ran[-1] |= ran
        result.answers.append(answers)
        result.tries.append(count[0])
        result.noise.append(torch.get_rng_state())
    for hook in hooks:
        hook.remove()
    run.close(is_complete=True)
    result.notices = run.report.notices
    return result


@torch.inference_mode()
def referred(case: Case, network: nn.Module, order: str, ran: list[set[int]], plan: str = PLAN) -> list[dict[int, Any]]:
    """Returns the expected answers of every step, by cond.

    They are full where `ran` says so. Elsewhere the answering block returns what it last returned, or the whole last answer is repeated.
    """
    network = copy.deepcopy(network)
    kept: dict[Sequence[int], Any] = {}
    whole: dict[int, Any] = {}
    expected = []
    for step, full in enumerate(ran):
        torch.manual_seed(step)
        answers: dict[int, Any] = {}
        for conds in ORDERS[order](step) if case.is_joint or case.answers is None else APART:
            is_full = full.issuperset(conds)

            def keep(_module: nn.Module, _args: Any, result: Any, conds=conds) -> None:
                if conds not in kept or shape_of(result) == shape_of(kept[conds]):  # otherwise the cache had no part in it
                    kept[conds] = copied(result)

            def give(_module: nn.Module, _args: Any, _result: Any, conds=conds) -> Any:
                return copied(kept[conds])

            hook: Any = nullcontext()
            if case.answers:
                hook = attrgetter(case.answers)(network).register_forward_hook(keep if is_full else give)
            with hook:
                answers |= parts_of(case.call(network, step, conds, plan), conds)
        if case.answers == "":
            whole |= {cond: answer for cond, answer in answers.items() if cond in full}
            answers = dict(whole)
        expected.append(answers)
    return expected


def shape_of(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else len(value)


def copied(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, dict):
        return {key: copied(item) for key, item in value.items()}
    return type(value)(copied(item) for item in value) if isinstance(value, (tuple, list)) else value


def distance(ours: list[dict[int, Any]], theirs: list[dict[int, Any]]) -> list[float]:
    """Returns for every step the largest difference, in units of the standard deviation of `theirs`."""

    def flat(answer: Any) -> Tensor:
        return answer.float().flatten() if isinstance(answer, Tensor) else torch.cat([part.float().flatten() for part in answer])

    pairs = [[(flat(ours[step][cond]), flat(theirs[step][cond])) for cond in sorted(ours[step])] for step in range(len(ours))]
    return [max(float((a - b).abs().max() / b.std().clamp_min(1e-12)) for a, b in pair) for pair in pairs]


def checked(case: Case, order: str = "together", plan: str = PLAN) -> Driven:
    """Runs a case, compares it with the reference and checks that the place is the expected one. Returns what happened."""
    network = case.make()
    pristine = copy.deepcopy(network)
    found = driven(case, network, order, plan)
    place = found.run.report.place
    far = distance(found.answers, referred(case, pristine, order, found.ran, plan))
    assert max(far) <= case.tolerance, f"{far} {place} {found.notices}"
    if case.answers is None:
        assert all(full == {0, 1} for full in found.ran), "nothing may be skipped"
        assert any(case.reason in notice for notice in found.notices), found.notices
    elif case.answers == "":
        assert place.startswith("whole output") and case.reason in place
    else:
        assert place.startswith("found and proved")
    assert is_tidy(network)
    return found


def is_tidy(network: nn.Module) -> bool:
    return not any("forward" in module.__dict__ for module in network.modules())


def skips(found: Driven, plan: str = PLAN) -> list[int]:
    """Returns the steps that the plan skips and in which no block ran."""
    return [step for step, letter in enumerate(plan) if letter == Kind.SKIPPED.value and not found.ran[step]]

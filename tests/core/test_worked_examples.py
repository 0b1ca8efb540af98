"""The worked examples of CONTRIBUTING.md, run as they stand there: a family, a policy and a predictor, in the lines that the page shows."""

from __future__ import annotations

import re
import sys
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, ClassVar

import pytest
import torch
from comfyui_duca.cache_core import CacheRun, Kind, ModelCall, Plan, RunStart, Settings, Timeline, families
from comfyui_duca.cache_core.planning import schedule
from comfyui_duca.cache_core.planning.policies import POLICIES, Given, Policy, Request
from comfyui_duca.cache_core.planning.schedule import Schedule
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Strategy
from torch import Tensor, nn

PAGE = (Path(__file__).resolve().parents[2] / "CONTRIBUTING.md").read_text(encoding="utf-8")
WIDTH, TOKENS = 16, 12


def example(section: str) -> str:
    """The first block of Python in a section of the page."""
    return re.search(rf"## {section}\n.*?```python\n(.*?)```", PAGE, re.DOTALL).group(1)


def lines_of(code: str) -> int:
    return len([line for line in code.splitlines() if line.strip() and not line.strip().startswith(("from ", "import ", '"""', "@"))])


# -- a policy -------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def with_policy(monkeypatch) -> str:
    """The page's policy in the table, as one line there would put it."""
    names: dict[str, Any] = {"Policy": Policy, "Request": Request, "Plan": Plan, "ClassVar": ClassVar, "dataclass": dataclass}
    exec(example("Add a policy"), names)
    monkeypatch.setattr(schedule, "POLICIES", MappingProxyType({**POLICIES, "every other": names["EveryOther"]}))
    return "every other"


def test_a_policy_takes_nine_lines_and_users_can_choose_it(with_policy):
    assert lines_of(example("Add a policy")) <= 9
    timeline = Timeline([1 - i / 8 for i in range(9)])
    start = RunStart(nn.Module(), families.FAMILIES[0], timeline, range(8))
    strategy = Settings(schedule=Schedule(with_policy)).strategy(start)
    assert str(strategy.policy.plan(8, range(8))) == "FaFaFaFa"
    assert str(strategy.policy.plan(8, range(2, 6))) == "FFFaFaFF"
    assert strategy.name == "every other 2x"


def test_a_policy_that_is_not_in_the_table_is_refused():
    with pytest.raises(ValueError, match="unknown schedule 'every other'"):
        Schedule("every other")


# -- a family -------------------------------------------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(nn.functional.scaled_dot_product_attention(*self.qkv(x).chunk(3, dim=-1)))


class Block(nn.Module):
    """As the page describes it."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = (nn.LayerNorm(WIDTH, elementwise_affine=False) for _ in range(2))
        self.attn = Attention()
        self.mlp = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU(), nn.Linear(4 * WIDTH, WIDTH))
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attn(self.norm1(x) * (1 + scale_a) + shift_a)
        return x + gate_m * self.mlp(self.norm2(x) * (1 + scale_m) + shift_m)


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, x: Tensor, t: Tensor) -> Tensor:
        h, c = self.x_embedder(x), t[:, None].expand(-1, WIDTH)
        for block in self.blocks:
            h = block(h, c)
        return self.head(h)


@pytest.fixture
def with_family(monkeypatch):
    """The page's family in the table, from a module in the families' folder."""
    module = ModuleType(f"{families.__name__}.toy")
    module.__package__ = families.__name__
    monkeypatch.setitem(sys.modules, module.__name__, module)
    exec(example("Add a family"), module.__dict__)
    monkeypatch.setattr(families, "FAMILIES", (*families.FAMILIES, module.TOY))


def run_of(network: nn.Module, plan: str, share: float = 1.0) -> tuple[CacheRun, list[Tensor]]:
    torch.manual_seed(0)
    steps = len(plan)
    timeline = Timeline([1 - i / steps for i in range(steps + 1)])
    start = RunStart(network, families.find_family(network), timeline, range(steps))
    run = CacheRun(Strategy(Given(Plan.parse(plan)), Reuse(), share), start)
    x, answers = torch.randn(2, TOKENS, 4), []
    for step in range(steps):
        with torch.inference_mode(), run.evaluation(timeline.sigmas[step]):
            run.cond_batch()
            t = torch.full((2,), timeline.times[step])
            answers.append(run.model_call(ModelCall(network, (0,), 0), lambda x=x, t=t: network(x.clone(), t)))
    run.close(is_complete=True)
    return run, answers


@pytest.fixture
def network() -> Toy:
    torch.manual_seed(1)
    return Toy().eval()


def test_a_family_takes_eleven_lines_and_mode_paper_serves_the_model(with_family, network):
    assert lines_of(example("Add a family")) <= 11
    run, answers = run_of(network, "FcacFcac")
    assert run.report.family == "toy" and run.report.place == "found and proved: skips blocks"
    assert "".join(evaluation.letter for evaluation in run.report.evaluations) == "FcacFcac" and not run.report.notices
    # With every token recomputed only attention is old, and this model's hardly changes with the time.
    plain = run_of(network, "F" * 8)[1]
    assert float((answers[1] - plain[1]).square().mean() / plain[1].var()) < 0.01
    assert not torch.equal(answers[1], plain[1])


def test_without_a_file_all_but_mode_paper_serves_it(network):
    run, _ = run_of(network, "FaaF")
    assert run.report.family == "toy" and run.report.place == "found and proved: skips blocks"
    assert run.report.count(Kind.SKIPPED) == 2 and not run.report.notices
    with pytest.raises(ValueError, match="no conservative evaluation"):
        run_of(network, "FcaF")


# -- a predictor ----------------------------------------------------------------------------------------------------------------


def test_a_predictor_takes_five_lines():
    code = example("Add a predictor")
    names: dict[str, Any] = {"__name__": "comfyui_duca.cache_core.predictors.halfway", "__package__": "comfyui_duca.cache_core.predictors"}
    module = ModuleType(names["__name__"])
    module.__dict__.update(names)
    sys.modules[module.__name__] = module
    try:
        exec(code, module.__dict__)
        assert lines_of(code) <= 5
        assert module.Halfway().weights([1.0, 0.8], 0.6) == [0.5, 0.5] and module.Halfway().weights([1.0], 0.9) == [1.0]
    finally:
        del sys.modules[module.__name__]

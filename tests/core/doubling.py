"""A model whose answers can be worked out by hand, and a driver that runs it as a host would.

It has two blocks that double what they get, and the head adds a tenth of the input: 10 → 20 → 40 → 41. A skipped evaluation puts the kept
hidden state, 40, in the place of the blocks and runs the head on the current input: for 20 it answers 42, not 82.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from comfyui_duca.cache_core import CacheRun, ModelCall, Places, Plan, RunStart, Timeline, find_family
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.predictors import Predictor, Reuse
from comfyui_duca.cache_core.strategy import Strategy
from torch import Tensor, nn

TOKENS = 5  # four or more, as layers that get fewer vectors are taken for modulations


class Doubling(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1, bias=False)
        nn.init.constant_(self.linear.weight, 2.0)

    def forward(self, h: Tensor) -> Tensor:
        return self.linear(h)


class InPlace(Doubling):
    """Writes into the hidden state that it is given."""

    def forward(self, h: Tensor) -> Tensor:
        return h.copy_(self.linear(h))


class Model(nn.Module):
    def __init__(self, block: type[nn.Module] = Doubling) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([block(), block()])

    def forward(self, x: Tensor) -> Tensor:
        h = x + 0
        for block in self.blocks:
            h = block(h)
        return self.head(h, x)

    def head(self, h: Tensor, x: Tensor) -> Tensor:
        return h + x / 10


class TwoStreams(Doubling):
    """Doubles an image and a text, each in a stream of its own."""

    def forward(self, img: Tensor, txt: Tensor) -> tuple[Tensor, Tensor]:
        return self.linear(img), self.linear(txt)


class PictureAndText(Model):
    """Has a text that is the image's first token minus 9: 10 → 1 → 2 → 4. `reads_text`: whether the head adds the text's hidden state."""

    def __init__(self, reads_text: bool) -> None:
        super().__init__(TwoStreams)
        self.reads_text = reads_text

    def forward(self, x: Tensor) -> Tensor:
        img, txt = x + 0, x[:, :1] - 9
        for block in self.blocks:
            img, txt = block(img, txt)
        return self.head(img + txt if self.reads_text else img, x)


@dataclass
class Driver:
    """Runs the evaluations of one run. Inputs and answers are one number for each cond, as all its tokens are equal."""

    model: nn.Module
    plan: str
    predictor: Predictor = field(default_factory=Reuse)
    factors: Mapping[str, Tensor] | None = None
    places: Places = field(default_factory=Places)

    def __post_init__(self) -> None:
        steps = len(self.plan)
        self.times = [1 - i / steps for i in range(steps + 1)]
        strategy = Strategy(Given(Plan.parse(self.plan)), self.predictor, factors=self.factors)
        family = find_family(self.model)
        self.run = CacheRun(strategy, RunStart(self.model, family, Timeline(self.times), range(steps), places=self.places))

    @torch.inference_mode()
    def evaluate(self, step: int, *calls: Mapping[int, float]) -> dict[int, float]:
        """Evaluates a step and returns the answer of each cond. Each of `calls` is a model call, with the input of each of its conds."""
        answers: dict[int, float] = {}
        with self.run.evaluation(self.times[step]):
            self.run.cond_batch()
            for numbers in calls:
                answers |= self._call(numbers)
        return answers

    def _call(self, numbers: Mapping[int, float]) -> dict[int, float]:
        x = torch.tensor([float(number) for number in numbers.values()]).view(-1, 1, 1).repeat(1, TOKENS, 1)
        answer = self.run.model_call(ModelCall(self.model, tuple(numbers), "one size"), lambda: self.model(x.clone()))
        assert bool((answer == answer[:, :1]).all())
        return dict(zip(numbers, answer[:, 0, 0].tolist()))

    def answers(self, inputs: Sequence[float]) -> list[float]:
        """Returns the answers of a whole run with one cond, one for each input."""
        found = [self.evaluate(step, {0: x})[0] for step, x in enumerate(inputs)]
        self.run.close(is_complete=True)
        return found

    @property
    def kinds(self) -> str:
        return "".join(evaluation.letter for evaluation in self.run.report.evaluations)

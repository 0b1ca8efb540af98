"""A calibration records every call once, and refuses a model whose input cannot be told from what its blocks are given."""

from __future__ import annotations

import pytest
import torch
from comfyui_duca.cache_core import ModelCall, RunStart, Timeline
from comfyui_duca.cache_core.families.shared.base import ModelFamily, Stack
from comfyui_duca.cache_core.planning.policies import AlwaysCompute
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.cache_core.tuning.calibrate import _Listening
from comfyui_duca.cache_core.tuning.tape import TapedRun
from torch import Tensor, nn

WIDTH, TOKENS = 8, 6


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.linear(h).tanh()


class Embedded(nn.Module):
    """more: Tokens that it adds between embedding and blocks, and that its head leaves out."""

    def __init__(self, more: int) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.more = more

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = torch.cat((h, h[:, : self.more].flip(-1)), dim=1)
        for block in self.blocks:
            h = block(h)
        h = self.head(h)
        return h[:, :TOKENS] + h.mean(1, keepdim=True)


FAMILY = ModelFamily("embedded", lambda model: isinstance(model, Embedded), (Stack("blocks", ("h",), {"h": "img"}),), embed="embed")


def recorded(more: int) -> TapedRun:
    torch.manual_seed(0)
    network, timeline = Embedded(more), Timeline([1.0, 0.5, 0.0])
    run = TapedRun(Strategy(AlwaysCompute(), _Listening()), RunStart(network, FAMILY, timeline, range(2)))
    for step in range(2):
        x = torch.randn(1, TOKENS, 4)
        with torch.inference_mode(), run.evaluation(timeline.sigmas[step]):
            run.cond_batch()
            run.model_call(ModelCall(network, ("cond",), 0), lambda x=x: network(x.clone()))
    run.close(is_complete=True)
    return run


def test_every_call_is_recorded_once():
    tape = recorded(more=0).tape
    assert [len(entries) for entries in tape.entries] == [1, 1]
    ((inputs, hidden),) = tape.trajectories()
    assert inputs.shape == (2, TOKENS, 4) and hidden.shape == (2, TOKENS, WIDTH)


def test_tokens_added_after_the_embedding_are_refused_in_words():
    with pytest.raises(ValueError, match="cannot be calibrated with this model and sampling setup: tokens are added"):
        recorded(more=2)

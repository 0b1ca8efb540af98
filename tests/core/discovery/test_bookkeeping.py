"""Attributes that a host keeps on modules for its own use are not taken for state of the network."""

from __future__ import annotations

import pytest
import torch
from comfyui_duca.cache_core import CacheRun, ModelCall, Places, Plan, RunStart, Timeline, find_family
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.predictors import Reuse
from comfyui_duca.cache_core.strategy import Strategy
from toys import Block, Toy, plainly


class Fetched(Block):
    """Marks itself and counts its calls, as a host marks blocks whose weights it has fetched."""

    def forward(self, h, c):
        self._v_fetched = getattr(self, "_v_fetched", 0) + 1
        return super().forward(h, c)


class Fetching(Toy):
    def build(self):
        self.blocks = torch.nn.ModuleList(Fetched() for _ in range(4))


@pytest.mark.parametrize(("bookkeeping", "ran"), [((), 4), (("_v",), 1)])
@torch.inference_mode()
def test_what_the_host_keeps_on_modules_counts_for_nothing(bookkeeping, ran):
    """The network is cached if the host names the attribute's prefix, and computed in full if not."""
    network, plan = Fetching(), "Faaa"
    strategy, timeline = Strategy(Given(Plan.parse(plan)), Reuse()), Timeline([1.0, 0.75, 0.5, 0.25, 0.0])
    run = CacheRun(strategy, RunStart(network, find_family(network), timeline, range(4), places=Places(bookkeeping)))
    before = 0
    full = []
    for step in range(4):
        with run.evaluation(timeline.sigmas[step]):
            run.cond_batch()
            run.model_call(ModelCall(network, (0,), 0), lambda step=step: plainly(network, step, (0,), plan))
        full.append(network.blocks[0]._v_fetched > before)
        before = network.blocks[0]._v_fetched
    assert sum(full) == ran and full[0]
    assert run.close(is_complete=True).place.startswith("found and proved" if bookkeeping else "not cached: it keeps state")

"""With torch.compile before or after the cache, the same evaluations are skipped and the picture is the same.

dynamo's eager backend is used: its tracing and guards are the real ones, and only code generation is left out.
"""

from __future__ import annotations

import pytest
import torch
from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfyui_duca.nodes.demo_flux import load_demo_model
from helpers.sampling import cached, kinds, last_report, sample

BLOCKS = [f"diffusion_model.double_blocks.{i}" for i in range(3)] + [f"diffusion_model.single_blocks.{i}" for i in range(6)]
AUTO = {"mode": "auto", "speedup": 2.0}
PAPER = {"mode": "paper", "cycle_length": 5, "token_share": 0.2}


@pytest.mark.parametrize(
    ("keys", "settings", "cache_first"),
    [(BLOCKS, AUTO, True), (BLOCKS, AUTO, False), (BLOCKS, PAPER, False), (["diffusion_model"], AUTO, True)],
    ids=["blocks-after", "blocks-before", "blocks-paper", "whole-after"],
)
def test_compiled_models_skip_the_same_evaluations(keys, settings, cache_first):
    model = load_demo_model()
    expected_model = cached(model, **settings)
    expected, plan = sample(expected_model, steps=8), kinds(last_report(expected_model))
    torch._dynamo.reset()
    if cache_first:
        compiled = cached(model, **settings)
        set_torch_compile_wrapper(compiled, backend="eager", keys=keys)
    else:
        compiled = model.clone()
        set_torch_compile_wrapper(compiled, backend="eager", keys=keys)
        compiled = cached(compiled, **settings)
    result = sample(compiled, steps=8)
    report = last_report(compiled)
    assert kinds(report) == plan and not report.notices
    assert torch.allclose(result, expected, atol=1e-4)
    torch._dynamo.reset()


def test_forecasts_leave_compiled_blocks_compiled():
    """Our overrides are outside of compiled blocks, so a run compiles each kind of block once and no more."""
    model = load_demo_model()
    torch._dynamo.reset()
    compiled = model.clone()
    set_torch_compile_wrapper(compiled, backend="eager", keys=BLOCKS)
    compiled = cached(compiled, **AUTO)
    sample(compiled, steps=8)
    torch._dynamo.utils.counters.clear()
    sample(compiled, steps=8)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 0
    torch._dynamo.reset()

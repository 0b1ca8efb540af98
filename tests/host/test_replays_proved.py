"""The first full evaluation of a run shows whether a family's replay of a block is right on this host."""

from __future__ import annotations

from dataclasses import replace

import torch
from comfyui_duca.cache_core import Plan, families
from comfyui_duca.cache_core.families.flux import FLUX
from comfyui_duca.cache_core.placing import Placing
from comfyui_duca.cache_core.planning.policies import Given
from comfyui_duca.cache_core.strategy import Strategy
from comfyui_duca.nodes import host
from comfyui_duca.nodes.demo_flux import load_demo_model
from helpers.sampling import kinds, last_report, sample

PLAN = "FcFcac"
RUN = {"steps": len(PLAN), "size": (16, 16)}


def run(model) -> tuple[torch.Tensor, str, list[str]]:
    cached = host.attach(model, Strategy(Given(Plan.parse(PLAN))))
    latent = sample(cached, **RUN)
    return latent, kinds(last_report(cached)), [text for text in last_report(cached).notices if "what the cache expects" in text]


def test_a_replay_that_is_right_is_used():
    assert run(load_demo_model())[1:] == (PLAN, [])


def test_a_replay_that_is_wrong_is_not_used_and_said_once(monkeypatch):
    """A host may have changed the arithmetic of its blocks. Here, the image stream of double blocks is doubled."""
    double, single = FLUX.stacks

    def doubled(block, call, cached):
        img, txt = double.replay(block, call, cached)
        return 2 * img, txt

    changed = replace(FLUX, stacks=(replace(double, replay=doubled), single))
    monkeypatch.setattr(families, "FAMILIES", (changed,))
    model = load_demo_model()
    latent, seen, said = run(model)
    assert seen == "FFFFaF" and len(said) == 1
    expected = host.attach(model, Strategy(Given(Plan.parse("FFFFaF"))))
    assert torch.equal(latent, sample(expected, **RUN))


def test_trying_a_replay_leaves_what_is_kept_as_it_is(monkeypatch):
    """The evaluations after it are the same with and without the trial."""
    tried = run(load_demo_model())[0]
    monkeypatch.setattr(Placing, "prove_replays", lambda *_args: True)
    assert torch.equal(tried, run(load_demo_model())[0])


def test_a_replay_that_does_not_run_is_not_used_either(monkeypatch):
    """A host may have renamed a layer that the replay calls."""
    double, single = FLUX.stacks

    def failing(block, call, cached):
        raise AttributeError("img_mlp")

    monkeypatch.setattr(families, "FAMILIES", (replace(FLUX, stacks=(replace(double, replay=failing), single)),))
    _, seen, said = run(load_demo_model())
    assert seen == "FFFFaF" and len(said) == 1

"""LTX-2 keeps video and sound side by side, on a stand-in."""

from __future__ import annotations

import comfy.model_management
import pytest
import torch
from checks import assert_right, assert_skips_repeat
from comfyui_duca.cache_core import find_family
from making import other_signature
from runs import PLAN, cached, cached_run, kept_tokens, kinds, network, report_of, sample
from zoo_stand_ins import LTX_2


@pytest.fixture(scope="module")
def pair_model():
    return LTX_2.make()


def test_video_and_sound_of_ltx_2_are_kept_side_by_side(pair_model):
    """These are 24 tokens of video (32 wide) and 5 of sound (16 wide), for two conds and one anchor."""
    assert find_family(network(pair_model)).name == "ltxav"
    assert_right(LTX_2, pair_model)
    report = cached_run(LTX_2, pair_model)
    assert kept_tokens(report) == [24, 5] and report.peak_bytes == 2 * (24 * 32 + 5 * 16) * 4
    assert all("forward" not in module.__dict__ for module in network(pair_model).modules())


def test_ltx_2_with_conds_in_calls_of_their_own_is_the_same(pair_model, monkeypatch):
    together = sample(LTX_2, cached(pair_model, PLAN))
    monkeypatch.setattr(comfy.model_management, "get_free_memory", lambda *_a, **_k: 0)
    patched = cached(pair_model, PLAN)
    torch.testing.assert_close(sample(LTX_2, patched), together, atol=1e-4 * max(1.0, float(together.std())), rtol=1e-4)
    assert kinds(patched) == PLAN and all(evaluation.calls == 2 for evaluation in report_of(patched).evaluations)


def test_ltx_2_without_sound_is_cached_too(pair_model):
    silent = LTX_2._replace(latent=LTX_2.latent[0])
    assert_skips_repeat(silent, pair_model, sample(silent, pair_model))


@pytest.mark.parametrize("part", ["block", "model"])
def test_ltx_2_of_another_form_is_found_by_watching_it(part):
    model = LTX_2.make()
    for module in [network(model)] if part == "model" else network(model).transformer_blocks:
        other_signature(module)
    assert_right(LTX_2, model)

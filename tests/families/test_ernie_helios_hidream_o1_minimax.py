"""What is particular to ERNIE-Image, Helios, HiDream-O1 and MiniMax H3, on stand-ins."""

from __future__ import annotations

import comfy.sample
import pytest
import torch
from checks import assert_right
from making import text, tiny
from runs import PLAN, cached, cached_run, kept_tokens, kinds, network, report_of, sample
from stand_in_ernie_helios import Ernie, Helios, config_of
from zoo_stand_ins import CASES, helios, hidream_o1, ids, minimax_h3

BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("name", ["ernie", "helios"])
def test_kinds_that_were_never_described_are_found_too(name):
    """These are ERNIE-Image without a projection of text, and Helios with a history that attends to the text."""
    case = BY_NAME[name]._replace(cond=text(7, 48)) if name == "ernie" else BY_NAME[name]
    assert_right(
        case, tiny(config_of(Ernie, 16), text_in_dim=48) if name == "ernie" else tiny(config_of(Helios, 16, 3), guidance_cross_attn=False)
    )


# -- Helios ---------------------------------------------------------------------------------------------------


def test_the_history_of_a_video_is_not_kept():
    """The history precedes 36 tokens of the video."""
    past = {"short": (2, 8, 6), "mid": (2, 8, 8), "long": (4, 8, 8)}  # 24, 4 and 1 tokens
    latents = {f"latents_history_{name}": normal(i, 1, 16, *shape) for i, (name, shape) in enumerate(past.items())}
    case = BY_NAME["helios"]._replace(cond=text(7, 24, **latents))
    model = helios()
    assert_right(case, model)
    assert kept_tokens(cached_run(case, model)) == [36]
    assert not torch.equal(sample(case, model), sample(BY_NAME["helios"], model))


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# -- HiDream-O1 -----------------------------------------------------------------------------------------------


def test_a_model_that_keeps_keys_of_the_text_itself():
    case = BY_NAME["hidream_o1"]
    assert_right(case, hidream_o1())


def test_patches_of_references_are_seen():
    case = BY_NAME["hidream_o1"]._replace(cond=ids(ref_patches=normal(3, 1, 5, 192)))
    model = hidream_o1()
    assert_right(case, model)
    assert not torch.equal(sample(case, model), sample(BY_NAME["hidream_o1"], model))


def test_a_run_that_fills_the_hosts_cache_of_the_text_is_cached_once_it_is_filled():
    """If the host's cache is empty, the first evaluation has all tokens and later ones have not, so the second is computed in full too."""
    case, model = BY_NAME["hidream_o1"], hidream_o1()
    expected = sample(case, cached(model, "FFFaFaFa"))
    network(model).clear_kv_cache()
    patched = cached(model, PLAN)
    torch.testing.assert_close(sample(case, patched), expected, atol=1e-4, rtol=1e-4)
    assert kinds(patched) == "FFFaFaFa" and ["other numbers of tokens" in text for text in report_of(patched).notices] == [True]


def test_a_place_is_found_although_the_host_fills_its_cache_first():
    """The host does so for both conds in the first evaluation."""
    case, model = BY_NAME["hidream_o1"], hidream_o1()
    network(model).clear_kv_cache()
    report = cached_run(case, model)
    assert report.place.startswith("found and proved") and not any("whole output" in text for text in report.notices)


def test_an_evaluation_in_which_the_host_fills_its_cache_is_not_skipped():
    """A third prompt may have pushed one out of the host's cache. A skip would store keys and values of blocks that did not run."""
    case, model = BY_NAME["hidream_o1"], hidream_o1()
    expected = sample(case, cached(model, "FaFFFaFa"))
    patched, done = cached(model, PLAN), []

    def clear(*_args):
        done.append(1)
        if len(done) == 3:
            network(model).clear_kv_cache()

    result = sample(case, patched, callback=clear)
    assert kinds(patched) == "FaFFFaFa" and report_of(patched).notices
    torch.testing.assert_close(result, expected, atol=1e-4, rtol=1e-4)
    assert len(network(model)._kv_cache_entries) == 2


# -- MiniMax H3 -----------------------------------------------------------------------------------------------


def test_video_and_sound_are_kept_together():
    """They are one sequence without rows, so there are no incremental evaluations."""
    for model in (minimax_h3(), minimax_h3(gate_compress=True)):
        assert_right(BY_NAME["minimax_h3"], model, last=lambda m: m.blocks[-1], has_incremental=False)


def test_a_given_picture_is_seen():
    case, model = BY_NAME["minimax_h3"]._replace(cond=text(7, 48, still=normal(3, 1, 8, 1, 4, 6))), minimax_h3()
    assert_right(case, model, last=lambda m: m.blocks[-1], has_incremental=False)
    assert not torch.equal(sample(case, model), sample(BY_NAME["minimax_h3"], model))


# -- all ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ernie", "helios", "hidream_o1"])
def test_a_batch_of_two_is_each_of_them(name):
    """MiniMax H3 takes one row at a time."""
    case = BY_NAME[name]
    model, noise = case.make(), normal(5, 2, *case.latent)

    def sampled(noise: torch.Tensor) -> torch.Tensor:
        latent, patched = torch.zeros_like(noise), cached(model, PLAN)
        for _ in range(2):  # the first run may fill the host's own cache of the text
            result = comfy.sample.sample(patched, noise, 8, 2.0, "euler", "simple", case.cond(1), case.cond(2), latent, disable_pbar=True)
        assert kinds(patched) == PLAN
        return result

    both = sampled(noise)
    for i in range(2):
        torch.testing.assert_close(both[i : i + 1], sampled(noise[i : i + 1]), atol=1e-4 * float(both.std()) + 1e-4, rtol=1e-4)

"""The engine gives the numbers that are worked out by hand, on a model of two blocks that double (doubling.py)."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from comfyui_duca.cache_core.engine.linear_sites import linear_sites
from comfyui_duca.cache_core.families import find_family
from comfyui_duca.cache_core.predictors import Taylor
from doubling import TOKENS, Doubling, Driver, InPlace, Model, PictureAndText


def test_without_a_cache():
    """10 → 20 → 40, and the head adds 1."""
    assert Model()(torch.full((1, TOKENS, 1), 10.0)).unique().tolist() == [41.0]


@pytest.mark.parametrize("block", [Doubling, InPlace])
def test_a_skip_answers_with_what_was_kept(block):
    """40 + 2 in place of 80 + 2. Blocks that write into what they are given do not change what is kept."""
    driver = Driver(Model(block), "FaaF")
    assert driver.answers([10, 20, 30, 20]) == [41, 42, 43, 82]
    assert driver.kinds == "FaaF" and driver.run.report.place == "found and proved: skips blocks"
    assert not driver.run.report.notices


def test_a_skip_runs_no_block():
    model, ran = Model(), []
    driver = Driver(model, "FFaa")
    driver.evaluate(0, {0: 10})  # the place is looked for in it
    model.blocks[0].linear.register_forward_hook(lambda *_: ran.append(1))
    assert [driver.evaluate(step, {0: 20})[0] for step in (1, 2, 3)] == [82, 82, 82]
    assert len(ran) == 1


def test_a_line_through_two_hidden_states():
    """After 40 and 80 come 120 and 160. The head alone uses the current input."""
    driver = Driver(Model(), "FFaa", Taylor(1))
    assert driver.answers([10, 20, 50, 60]) == pytest.approx([41, 82, 120 + 5, 160 + 6])


def test_one_stream_is_kept_where_the_head_reads_one():
    """That is the image's 5 tokens of one float32, for one cond."""
    driver = Driver(PictureAndText(reads_text=False), "Fa")
    assert driver.answers([10, 20]) == [41, 42]
    assert driver.run.report.peak_bytes == TOKENS * 4


def test_two_streams_are_kept_where_the_head_reads_both():
    """The image goes from 10 to 40 and its text from 1 to 4: together 44, and the head adds 1. Both are kept."""
    driver = Driver(PictureAndText(reads_text=True), "FaF")
    assert driver.answers([10, 20, 20]) == [45, 46, 80 + 44 + 2]
    assert driver.run.report.peak_bytes == (TOKENS + 1) * 4


def test_an_incremental_evaluation():
    """A layer returns its kept output plus its factors (here 1 where the weight is 2) times the change of its input.

    From 10 to 20: 20 + 1·10 = 30, then 40 + 1·(30 - 20) = 50, and the head adds 2.
    """
    model = Model()
    first = Driver(model, "F")
    first.answers([10])
    sites = linear_sites(find_family(model), first.places.latest(model).layer_calls, model)
    factors = {f"{site.key(part)}.{letter}": torch.ones(1, 1) for site in sites for part in site.parts for letter in "AB"}
    driver = Driver(model, "Fi", factors=factors)
    assert driver.answers([10, 20]) == [41, 52]
    assert driver.kinds == "Fi"


def test_conds_have_hidden_states_of_their_own():
    """10 keeps 40 and 100 keeps 400, in one call or in two, in any order. The run has seen both forms of call before."""
    before = Driver(Model(), "FF")
    before.evaluate(0, {0: 10, 1: 10})
    before.evaluate(1, {0: 10}, {1: 10})
    driver = Driver(before.model, "FaaaF", places=before.places)
    assert driver.evaluate(0, {0: 10, 1: 100}) == {0: 41, 1: 410}
    assert driver.evaluate(1, {0: 20, 1: 20}) == {0: 42, 1: 402}
    assert driver.evaluate(2, {1: 30, 0: 30}) == {1: 403, 0: 43}
    assert driver.evaluate(3, {1: 50}, {0: 50}) == {1: 405, 0: 45}
    assert driver.evaluate(4, {0: 20, 1: 30}) == {0: 82, 1: 123}
    driver.run.close(is_complete=True)
    assert driver.run.report.peak_bytes == 2 * TOKENS * 4


def test_a_cond_that_was_not_there_is_computed():
    driver = Driver(Model(), "Fa")
    driver.evaluate(0, {0: 10})
    assert driver.evaluate(1, {1: 20}) == {1: 82}


def kept_by(driver: Driver) -> list[weakref.ref]:
    """Returns references to what a run holds: the tensors of the hidden state's size with the hidden state's values."""
    gc.collect()
    tensors = [thing for thing in gc.get_objects() if type(thing) is torch.Tensor and thing.numel() == TOKENS]
    return [weakref.ref(tensor) for tensor in tensors if tensor.unique().tolist() == [40.0]]


@pytest.mark.parametrize("how", ["finished", "cancelled between evaluations", "cancelled in a block"])
def test_a_run_that_ends_frees_what_it_kept(how):
    model = Model()
    driver = Driver(model, "Faa")
    driver.evaluate(0, {0: 10})
    kept = kept_by(driver)
    assert kept, "nothing is kept"
    if how == "cancelled in a block":
        handle = model.blocks[1].register_forward_pre_hook(_cancel)
        with pytest.raises(KeyboardInterrupt):
            driver.evaluate(1, {1: 10})
        handle.remove()
    driver.run.close(is_complete=how == "finished")
    gc.collect()
    assert not [reference for reference in kept if reference() is not None]
    assert not any("forward" in module.__dict__ for module in model.modules())
    assert model(torch.full((1, TOKENS, 1), 10.0)).unique().tolist() == [41.0]


def _cancel(*_args: object) -> None:
    raise KeyboardInterrupt

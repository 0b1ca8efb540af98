"""Prompts of unequal lengths, which the host calls separately, each have a place of their own in a stream of text and image."""

from __future__ import annotations

import pytest
import torch
from checks import repeated
from making import Case
from runs import STEPS, cached, kinds, report_of, sample
from zoo import CASES

NAMES = ("chroma", "hunyuan3d", "lumina", "aura", "ernie", "wan")
PLAN = "FaFaFaFa"


def short(case: Case, seed: int, tokens: int) -> Case:
    """Returns the case with the prompt of this seed cut to this number of tokens."""
    return case._replace(
        cond=lambda other: [[text[:, :tokens] if other == seed else text, extra] for text, extra in case.cond(other)], calls=2
    )


@pytest.fixture(scope="module", params=[case for case in CASES if case.name in NAMES], ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


@pytest.fixture(scope="module")
def model(case):
    return case.make()


@pytest.mark.parametrize("seed, tokens", [(2, 3), (1, 2)], ids=["negative", "positive"])
def test_prompts_of_unequal_lengths_in_one_run(case, model, seed, tokens):
    """They are so unequal that the host does not pad them."""
    uneven = short(case, seed, tokens)
    patched = cached(model, PLAN)
    result = sample(uneven, patched)
    report = report_of(patched)
    assert kinds(patched) == PLAN and not report.notices and [e.calls for e in report.evaluations] == [2] * STEPS
    assert torch.equal(result, repeated(uneven, model, PLAN))
    assert report.peak_bytes == report.predicted_bytes


def test_a_prompt_of_another_length_in_the_next_run(case, model):
    """What was found for the first length is not used for the second, on one model in one process."""
    for tokens in (7, 5, 7):
        other = case._replace(cond=lambda seed, tokens=tokens: [[text[:, :tokens], extra] for text, extra in case.cond(seed)])
        patched = cached(model, PLAN)
        result = sample(other, patched)
        assert kinds(patched) == PLAN and not report_of(patched).notices
        assert torch.equal(result, repeated(other, model, PLAN))

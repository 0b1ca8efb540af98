"""Networks that no file describes are found, proved and answered correctly, in every way that hosts write their loops."""

from __future__ import annotations

import pytest
import torch
from toys import ORDERS, Case, checked, latent, skips, text_of
from toys_in_loops import Joint
from toys_served import SERVED

JOINT = {"frames around the batch", "packed", "packed, txt last", "swapped inside"}  # what they keep cannot be divided by conds


@pytest.mark.parametrize(
    ("name", "order"),
    [(name, order) for name in SERVED for order in ORDERS if (name, order) != ("dropout", "both")],  # the orders draw other random numbers
)
def test_is_found_and_right(name, order):
    case = SERVED[name]
    found = checked(case, order)
    passed = found.run.report.place.removeprefix("found and proved: skips ").split(", ")
    assert set(passed) == set(case.passed)
    assert skips(found) == ([1, 2, 4] if order != "both" else [2] if name in JOINT else [2, 4])
    assert found.run.report.peak_bytes > 0 and len(found.notices) <= 1


def of_own_length(network, step, conds, plan):
    [cond] = conds
    return network(latent(step), torch.tensor([1 - step / len(plan)]), text_of(cond, 4 + 3 * cond))


def test_texts_of_other_lengths():
    """Where the host's signature differs between texts, both conds are skipped. Where it does not, one is computed in full."""
    signed = Case(Joint, "blocks.3", ("doubles", "blocks"), call=of_own_length, signature=lambda conds: conds)
    assert checked(signed, "apart").ran == [{0, 1}, set(), set(), {0, 1}, set(), {0, 1}]
    unsigned = Case(Joint, "blocks.3", ("doubles", "blocks"), call=of_own_length)
    found = checked(unsigned, "apart")
    assert found.ran == [{0, 1}, {1}, {1}, {0, 1}, {1}, {0, 1}]
    assert any("other numbers of tokens" in notice for notice in found.notices)

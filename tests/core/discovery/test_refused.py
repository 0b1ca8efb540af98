"""Networks in which a hidden state cannot be put back, or that remember what they saw: their whole output is kept, or nothing, and never
is an answer wrong without a word."""

from __future__ import annotations

import pytest
from toys import ORDERS, checked, skips
from toys_refused import NOTHING, STATEFUL, UNSPLIT


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("name", UNSPLIT)
def test_the_whole_output_is_kept(name, order):
    found = checked(UNSPLIT[name], order)
    assert 2 in skips(found) or order == "both"
    assert any("only the final output" in notice for notice in found.notices)


@pytest.mark.parametrize("order", ["together", "apart"])
@pytest.mark.parametrize("name", STATEFUL)
def test_what_remembers_is_left_alone(name, order):
    """Its answers are those without a cache, too: looking at it changed nothing that it remembers."""
    checked(STATEFUL[name], order)


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_go_by(name):
    checked(NOTHING[name])

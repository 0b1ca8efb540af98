"""Networks in which a hidden state cannot be put back are cached by their whole output; networks that keep state are not cached.

In no case is an answer wrong without a notice.
"""

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
    """Answers are those without a cache, so looking at the network did not change its state."""
    checked(STATEFUL[name], order)


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_to_go_by(name):
    checked(NOTHING[name])

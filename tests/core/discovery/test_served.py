"""Networks that nobody described, in every way that hosts write their loops: found, proved, and right."""

from __future__ import annotations

import pytest
import torch
from toys import ORDERS, Case, Toy, checked, latent, skips, text_of
from toys_in_loops import (
    InPlace,
    InSequence,
    InTurns,
    Joint,
    JointTxtLast,
    Keywords,
    Named,
    Nested,
    OddOutputs,
    Reversed,
    SameLength,
    Single,
    SwappedReturn,
    in_form,
    leaving_out,
)
from toys_in_shapes import (
    Anew,
    Conditioning,
    Dropping,
    Folded,
    FoldedOuter,
    Grid,
    LastFeedsNothing,
    Lower,
    Lower16,
    Packed,
    PackedEqually,
    PackedTxtLast,
    Pixels,
    Refined,
    SwappedInside,
    Two,
    UInTwo,
    UShaped,
    numbered,
    with_two,
)

SERVED = {
    "plain": Case(Toy, "blocks.3"),
    "keywords": Case(Keywords, "blocks.3"),
    "dict": Case(in_form("dict"), "blocks.3"),
    "tuple": Case(in_form("tuple"), "blocks.3"),
    "list": Case(in_form("list"), "blocks.3"),
    "none, bool, number": Case(OddOutputs, "blocks.3"),
    "in place": Case(InPlace, "blocks.3"),
    "ModuleDict": Case(Named, "blocks.layer3"),
    "Sequential": Case(InSequence, "blocks.3"),
    "list of one": Case(Single, "blocks.0"),
    "lists of lists": Case(Nested, "blocks.2.1", ("blocks.0", "blocks.1", "blocks.2")),
    "reverse": Case(Reversed, "blocks.0"),
    "the first block left out": Case(leaving_out(0), "blocks.3"),
    "a block left out": Case(leaving_out(2), "blocks.3"),
    "the last two left out": Case(leaving_out(2, 3), "blocks.1"),
    "two lists in turns": Case(InTurns, "others.3", ("blocks", "others")),
    "double, then joint": Case(Joint, "blocks.3", ("doubles", "blocks")),
    "double, then joint, txt last": Case(JointTxtLast, "blocks.3", ("doubles", "blocks")),
    "txt as long as img": Case(SameLength, "blocks.3", ("doubles", "blocks")),
    "txt as long as img, in turns": Case(SwappedReturn, "blocks.3"),
    "grid": Case(Grid, "blocks.3"),
    "frames in the batch": Case(Folded, "blocks.3"),
    "swapped inside": Case(SwappedInside, "blocks.3"),
    "made anew": Case(Anew, "blocks.3"),
    "bfloat16": Case(Lower, "blocks.3"),
    "float16": Case(Lower16, "blocks.3"),
    "refiners": Case(Refined, "blocks.3", ("refiner", "image_refiner", "blocks")),
    "pixel head": Case(Pixels, "blocks.7"),
    "conditioning": Case(Conditioning, "blocks.3"),
    "u-shaped": Case(UShaped, "blocks.5"),
    "u-shaped in two lists": Case(UInTwo, "blocks.2", ("down", "blocks")),
    "dropout": Case(Dropping, "blocks.3", is_joint=True),
    "two latents": Case(Two, "blocks.3", call=with_two),
    "a list for nothing": Case(LastFeedsNothing, "blocks.5"),
    "frames around the batch": Case(FoldedOuter, "blocks.3", is_joint=True),
    "packed": Case(Packed, "blocks.3", call=numbered, is_joint=True, signature=lambda conds: conds),
    "packed, txt last": Case(PackedTxtLast, "blocks.3", call=numbered, is_joint=True, signature=lambda conds: conds),
    "packed equally": Case(PackedEqually, "blocks.3"),
}
JOINT = {"frames around the batch", "packed", "packed, txt last", "swapped inside"}  # as what is kept cannot be told apart by conds


@pytest.mark.parametrize(
    ("name", "order"),
    [(name, order) for name in SERVED for order in ORDERS if (name, order) != ("dropout", "both")],  # those draw other random numbers
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
    """Where the host's signature tells them apart, both are served; where it does not, one is computed in full."""
    told = Case(Joint, "blocks.3", ("doubles", "blocks"), call=of_own_length, signature=lambda conds: conds)
    assert checked(told, "apart").ran == [{0, 1}, set(), set(), {0, 1}, set(), {0, 1}]
    untold = Case(Joint, "blocks.3", ("doubles", "blocks"), call=of_own_length)
    found = checked(untold, "apart")
    assert found.ran == [{0, 1}, {1}, {1}, {0, 1}, {1}, {0, 1}]
    assert any("other numbers of tokens" in notice for notice in found.notices)

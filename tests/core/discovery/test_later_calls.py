"""Later calls may differ from the one in which a place was found, in lists, arguments, tokens or values; and finding it costs little."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from toys import PLAN, At, Block, Case, Toy, checked, distance, driven, referred, skips
from toys_refused import NOTHING, STATEFUL, UNSPLIT
from toys_served import SERVED


class NotFiniteAtFirst(At):
    def head(self, h, c, t):
        return super().head(h, c, t) * (float("nan") if self.step(t) == 0 else 1)


class ZeroAtFirst(At):
    """Answers at the first step without anything of its blocks."""

    def head(self, h, c, t):
        return super().head(h, c, t) * (1 - t[:, None, None])


@pytest.mark.parametrize("toy", [NotFiniteAtFirst, ZeroAtFirst])
def test_a_first_answer_that_tells_nothing(toy):
    """Nothing is concluded from such an answer: the place is found in the next full evaluation."""
    case = Case(toy, "blocks.3")
    network = toy()
    found = driven(case, network)
    assert found.ran == [{0, 1}, {0, 1}, set(), {0, 1}, set(), {0, 1}]
    expected = referred(case, network, "together", found.ran)
    assert max(distance(found.answers[1:], expected[1:])) < 1e-5
    assert torch.equal(found.answers[0][0].isnan(), expected[0][0].isnan())


class Leaving(At):
    """Leaves one block out in the second step."""

    out = 1

    def middle(self, h, c, context, t):
        for i, block in enumerate(self.blocks):
            h = h if i == self.out and self.step(t) == 1 else block(h, c)
        return h


@pytest.mark.parametrize("out", [0, 1, 3])
def test_a_block_that_is_left_out_later(out):
    """Skips go on if the first block or a middle one was left out. If the last one was, whose result they use, the step is full."""
    found = checked(Case(type("Leaving", (Leaving,), {"out": out}), "blocks.3"))
    assert skips(found) == ([4] if out == 3 else [1, 2, 4])


class LeavingBoth(At):
    """Leaves the first and the last block out in the second step."""

    def middle(self, h, c, context, t):
        for i, block in enumerate(self.blocks):
            h = h if i in (0, 3) and self.step(t) == 1 else block(h, c)
        return h


def test_the_first_and_the_last_block_are_left_out_later():
    """As blocks between them run, no other node has answered for the network: the step is computed in full."""
    found = checked(Case(LeavingBoth, "blocks.3"))
    assert skips(found) == [2, 4]


class Joining(At):
    """Leaves one block out in the first step only."""

    def middle(self, h, c, context, t):
        for i, block in enumerate(self.blocks):
            h = h if i == 1 and self.step(t) == 0 else block(h, c)
        return h


def test_a_block_that_was_left_out_at_first():
    """What the block would return is not known, so the steps after the first are computed in full until a place is found with it."""
    found = checked(Case(Joining, "blocks.3"))
    assert skips(found) == [4]
    assert any("did not run before" in notice for notice in found.notices)


class Experts(At):
    """Runs another list of blocks from the second step on."""

    def build(self):
        self.others = nn.ModuleList(Block() for _ in range(4))

    def middle(self, h, c, context, t):
        for block in self.blocks if self.step(t) < 1 else self.others:
            h = block(h, c)
        return h


def test_another_list_in_later_steps():
    network = Experts()
    case = Case(Experts, "blocks.3", ("blocks", "others"))
    found = driven(case, network)
    plain = driven(case, network, is_cached=False)
    assert found.ran == plain.ran == [{0, 1}] * len(PLAN)
    assert max(distance(found.answers, plain.answers)) == 0
    assert found.notices


class Optional(Block):
    def forward(self, h, c, mask=None, **more):
        change = self.change(h, c)
        return h + (change if mask is None else change * mask)


class Sometimes(At):
    """Gives its blocks a mask in some calls and none in others. `first` says which calls come first."""

    first = True

    def build(self):
        self.blocks = nn.ModuleList(Optional() for _ in range(4))

    def middle(self, h, c, context, t):
        mask = torch.linspace(0, 1, h.shape[1])[None, :, None]
        given = {"mask": mask} if self.first == (self.step(t) in (0, 3)) else {}
        for block in self.blocks:
            h = block(h, c, **given)
        return h


class ByName(Sometimes):
    """Gives the hidden state by position in the first call and by name in the next."""

    def middle(self, h, c, context, t):
        for block in self.blocks:
            h = block(h, c) if self.step(t) in (0, 3) else block(h=h, c=c)
        return h


def test_arguments_that_come_and_go():
    assert skips(checked(Case(Sometimes, "blocks.3"))) == [1, 2, 4]
    assert skips(checked(Case(type("Sometimes", (Sometimes,), {"first": False}), "blocks.3"))) == [1, 2, 4]
    found = checked(Case(ByName, "blocks.3"))
    assert skips(found) == [] and any("called with other arguments" in notice for notice in found.notices)


class Fewer(At):
    """Merges tokens before its blocks and separates them again after them, at the steps in `late`."""

    late = (1,)

    def middle(self, h, c, context, t):
        merged = self.step(t) in self.late
        h = h.unflatten(1, (-1, 2)).mean(2) if merged else h
        h = super().middle(h, c, context, t)
        return h.repeat_interleave(2, 1) if merged else h


@pytest.mark.parametrize("late", [(1,), (1, 2, 3, 4, 5), (3,)])
def test_other_numbers_of_tokens_inside(late):
    found = checked(Case(type("Fewer", (Fewer,), {"late": late}), "blocks.3"))
    assert not set(late).intersection(skips(found))
    assert any("other numbers of tokens" in notice for notice in found.notices)


# -- what finding a place costs ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", [*SERVED, *UNSPLIT, *NOTHING, *STATEFUL])
def test_random_numbers_are_those_without_a_cache(name):
    """After the first evaluation, which includes all trials, the state of torch's random numbers is as without a cache."""
    case = {**SERVED, **UNSPLIT, **NOTHING, **STATEFUL}[name]
    network = case.make()
    plain = driven(case, copy.deepcopy(network), plan="FF", is_cached=False)
    found = driven(case, network, plan="FF")
    assert torch.equal(found.noise[0], plain.noise[0])
    assert max(distance(found.answers[:1], plain.answers[:1])) == 0


@pytest.mark.parametrize("name", SERVED)
def test_few_tries(name):
    """In the first evaluation, with both conds in one call, the network is called ten times at most: once in full, else to prove skips."""
    case = SERVED[name]
    assert driven(case, case.make(), plan="FF").tries[0] <= 10


class ReadingBetween(Toy):
    """For one cond alone the head also reads the hidden state between the two lists, so that one of the lists must run."""

    def build(self):
        self.others = nn.ModuleList(Block() for _ in range(4))

    def middle(self, h, c, context, t):
        for block in self.blocks:
            h = block(h, c)
        between = h.clone()
        for block in self.others:
            h = block(h, c)
        return h + between if len(h) == 1 else h


def test_what_was_kept_elsewhere_is_no_use():
    """Together, conds keep the second list's result; alone, they keep the first one's. They differ, though of one shape."""
    case, network = Case(ReadingBetween, "others.3", ("blocks", "others")), ReadingBetween()
    found = driven(case, network, "both")
    plain = driven(case, network, "both", is_cached=False)
    assert found.ran[4] == {0, 1}, "together, after a full evaluation apart"
    assert torch.equal(found.answers[4][0], plain.answers[4][0]) and torch.equal(found.answers[4][1], plain.answers[4][1])

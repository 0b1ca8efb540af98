"""Networks in which a hidden state cannot be put back, or that keep state between calls."""

from __future__ import annotations

import weakref
from collections import deque

import torch
from torch import nn
from torch.nn import functional
from toys import TOKENS, WIDTH, Block, Case, Toy, latent, text_of
from toys_in_loops import InPlaceUnreturned
from toys_in_shapes import Lower


class EarlyRead(Toy):
    """Has a head that reads the first block's result."""

    def middle(self, h, c, context, t):
        early = None
        for block in self.blocks:
            h = block(h, c)
            early = h if early is None else early
        return h + early


class EarlyReadALittle(Lower):
    """Has a head that reads so little of the first block's result that bfloat16's rounding nearly hides it."""

    def middle(self, h, c, context, t):
        h, c = h.to(self.dtype), c.to(self.dtype)
        early = None
        for block in self.blocks:
            h = block(h, c)
            early = h if early is None else early
        return (functional.layer_norm(h, h.shape[-1:]) + 0.06 * functional.layer_norm(early, h.shape[-1:])).float()

    def head(self, h, c, t):
        return self.unembed(h)


class AllRead(Toy):
    """Has a head that reads the mean of all blocks' results."""

    def middle(self, h, c, context, t):
        seen = []
        for block in self.blocks:
            h = block(h, c)
            seen.append(h)
        return torch.stack(seen).mean(0)


class Keys(Block):
    def forward(self, h, c, present=None):
        return h + self.change(h, c), (h * 2, h * 3, None)


class Unpacking(Toy):
    """Unpacks keys and values that only a block that runs returns."""

    def build(self):
        self.blocks = nn.ModuleList(Keys() for _ in range(4))

    def middle(self, h, c, context, t):
        for block in self.blocks:
            h, present = block(h, c)
            keys, values, _ = present
            c = c + (keys - values).mean(1)
        return h


class KeysOnly(Keys):
    def forward(self, h, c, present=None):
        return h + self.change(h, c), h.new_zeros(h.shape[0], 3, 2, 7).unbind(1)


class UnpackingShapes(Unpacking):
    """Unpacks keys and values that have a shape of their own."""

    def build(self):
        self.blocks = nn.ModuleList(KeysOnly() for _ in range(4))

    def middle(self, h, c, context, t):
        for block in self.blocks:
            h, (keys, values, _) = block(h, c)
            h = h + 0 * (keys.mean() + values.mean())
        return h


UNSPLIT = {
    "a head that reads an early hidden state": Case(EarlyRead, "", reason="does not return the same output"),
    "a head that reads a little of it": Case(EarlyReadALittle, "", reason="does not return the same output"),
    "a head that reads all": Case(AllRead, "", reason="does not return the same output"),
    "in place, results not looked at": Case(InPlaceUnreturned, "", reason="does not return the same output"),
    "keys and values are used": Case(Unpacking, "", reason="does not return the same output"),
    "keys and values are unpacked": Case(UnpackingShapes, "", reason="does not return the same output"),
}


# -- networks that keep state -----------------------------------------------------------------------------


class Counting(Block):
    """Counts its calls, and computes something else in each."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def forward(self, h, c):
        self.count += 1
        return h + self.change(h, c) * (1 + 0.1 * self.count)


class CountingInBuffer(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, h, c):
        self.count += 1
        return h + self.change(h, c) * (1 + 0.1 * self.count)


class Remembering(Block):
    """Also attends to what it was given in the call before."""

    def __init__(self) -> None:
        super().__init__()
        self.cache = None

    def forward(self, h, c):
        seen = h if self.cache is None or self.cache.shape[0] != h.shape[0] else torch.cat((self.cache, h), 1)
        self.cache = h
        return h + self.change(seen, c)[:, -h.shape[1] :]


class Shelf:
    def __init__(self) -> None:
        self.items: deque = deque()


class RememberingOnAShelf(Block):
    """Keeps state in an object that is no module."""

    def __init__(self) -> None:
        super().__init__()
        self.shelf = Shelf()

    def forward(self, h, c):
        self.shelf.items.append(h.mean())
        return h + self.change(h, c) * (1 + len(self.shelf.items) + self.shelf.items[0])


class WritingIntoMemory(Block):
    """Keeps state in memory that its first call allocates."""

    def __init__(self) -> None:
        super().__init__()
        self.memory = {}

    def forward(self, h, c):
        if "h" not in self.memory:
            self.memory["h"] = torch.zeros(1, h.shape[1], h.shape[2])
        self.memory["h"] += h[:1]
        return h + self.change(h, c) + self.memory["h"]


def of_blocks(kind: type[nn.Module]) -> type[Toy]:
    class Made(Toy):
        def build(self):
            self.blocks = nn.ModuleList(kind() for _ in range(4))

    return Made


class HandedIn(Block):
    def forward(self, h, c, cache, number):
        seen = cache.get(number, h)
        cache[number] = h
        return h + self.change(torch.cat((seen, h), 1), c)[:, -h.shape[1] :]


class WithCache(Toy):
    """Writes keys and values into a dict that its caller keeps."""

    def build(self):
        self.blocks = nn.ModuleList(HandedIn() for _ in range(4))

    def forward(self, x, t, context, cache):
        c = self.condition(t, context)
        h = self.embed(x)
        for number, block in enumerate(self.blocks):
            h = block(h, c, cache, number)
        return self.head(h, c, t)


class Caller:
    """Calls a network with a cache for each set of conds, as an autoregressive pipeline does: a dict, or a tensor that is written into."""

    def __init__(self, make) -> None:
        self.make, self.caches = make, weakref.WeakKeyDictionary()

    def __call__(self, network, step, conds, plan):
        cache = self.caches.setdefault(network, {}).setdefault(conds, self.make(len(conds)))
        x = latent(step).repeat(len(conds), 1, 1)
        return network(x, torch.full((len(conds),), 1 - step / len(plan)), torch.cat([text_of(cond) for cond in conds]), cache)


class WritingHandedIn(Block):
    def forward(self, h, c, cache):
        cache += 0.1 * h
        return h + self.change(h + cache, c)


class WithMemory(Toy):
    def build(self):
        self.blocks = nn.ModuleList(WritingHandedIn() for _ in range(4))

    def forward(self, x, t, context, cache):
        c = self.condition(t, context)
        h = self.embed(x)
        for block in self.blocks:
            h = block(h, c, cache)
        return self.head(h, c, t)


class Permuting(Toy):
    """Has another order of tokens around its blocks in every call."""

    def build(self):
        self.calls = 0

    def middle(self, h, c, context, t):
        self.calls += 1
        order = torch.randperm(h.shape[1], generator=torch.Generator().manual_seed(self.calls))
        h = super().middle(h[:, order], c, context, t)
        return h[:, order.argsort()]


class PermutingInside(Toy):
    """Has a first block that orders the tokens, and a head that restores the order."""

    def build(self):
        self.calls = 0

    def middle(self, h, c, context, t):
        self.calls += 1
        order = torch.randperm(h.shape[1], generator=torch.Generator().manual_seed(self.calls))
        for i, block in enumerate(self.blocks):
            h = block(h[:, order] if i == 1 else h, c)
        return h[:, order.argsort()]


class Feedback(Toy):
    """Adds a part of its last answer to the next one."""

    def build(self):
        self.previous = None

    def head(self, h, c, t):
        answer = super().head(h, c, t)
        if self.previous is not None and self.previous.shape == answer.shape:
            answer = answer + 0.3 * self.previous
        self.previous = answer
        return answer


class DroppingHead(Toy):
    def head(self, h, c, t):
        return functional.dropout(super().head(h, c, t), 0.2, training=True)


class NoisyHead(Toy):
    def head(self, h, c, t):
        answer = super().head(h, c, t)
        return answer + 0.1 * torch.randn_like(answer)


REMEMBERS = "it keeps state between calls"
STATEFUL = {
    "counter in a block": Case(of_blocks(Counting), None, reason=REMEMBERS, is_joint=True),
    "counter in a buffer": Case(of_blocks(CountingInBuffer), None, reason=REMEMBERS, is_joint=True),
    "keys and values in a block": Case(of_blocks(Remembering), None, reason=REMEMBERS, is_joint=True),
    "on a shelf": Case(of_blocks(RememberingOnAShelf), None, reason=REMEMBERS, is_joint=True),
    "memory in a block": Case(of_blocks(WritingIntoMemory), None, reason=REMEMBERS, is_joint=True),
    "a dict handed in": Case(WithCache, None, reason=REMEMBERS, call=Caller(lambda _rows: {})),
    "a tensor handed in": Case(WithMemory, None, reason=REMEMBERS, call=Caller(lambda rows: torch.zeros(rows, TOKENS, WIDTH))),
    "permutation around the blocks": Case(Permuting, None, reason=REMEMBERS, is_joint=True),
    "permutation inside the blocks": Case(PermutingInside, None, reason=REMEMBERS, is_joint=True),
    "feedback": Case(Feedback, None, reason="", is_joint=True),
    "dropout in the head": Case(DroppingHead, None, reason="returns different outputs for the same input", is_joint=True),
    "noise in the head": Case(NoisyHead, None, reason="returns different outputs for the same input", is_joint=True),
}


# -- networks without a place -----------------------------------------------------------------------------


class Twice(Toy):
    def middle(self, h, c, context, t):
        return super().middle(super().middle(h, c, context, t), c, context, t)


class Layerless(Toy):
    """Has no list of blocks."""

    def build(self):
        del self.blocks
        self.first, self.second = Block(), Block()

    def middle(self, h, c, context, t):
        return self.second(self.first(h, c), c)


class SmallList(Toy):
    """Does all its work in two large blocks. Its list is not worth a copy."""

    def build(self):
        self.blocks = nn.ModuleList(nn.Linear(1, 1) for _ in range(4))
        self.first, self.second = Block(), Block()

    def middle(self, h, c, context, t):
        h = self.second(self.first(h, c), c)
        scale = h.mean((1, 2))[:, None]
        for block in self.blocks:
            scale = block(scale)
        return h * scale[:, None]


class MostlyLeavingOut(Toy):
    """Runs one of its four blocks."""

    def middle(self, h, c, context, t):
        return self.blocks[2](h, c)


class Zero(Toy):
    """Has a final layer of zeros."""

    def build(self):
        nn.init.zeros_(self.unembed.weight)
        nn.init.zeros_(self.unembed.bias)


NOTHING = {
    "blocks called twice": Case(Twice, None, reason="it has no list of blocks that each run once, in order"),
    "no lists": Case(Layerless, None, ("first", "second"), reason="it has no list of blocks that each run once, in order"),
    "a small list": Case(SmallList, None, ("first", "second"), reason="it has no list of blocks that each run once, in order"),
    "most blocks left out": Case(MostlyLeavingOut, None, reason="it has no list of blocks that each run once, in order"),
    "zero": Case(Zero, None, reason="nothing could be skipped"),
}

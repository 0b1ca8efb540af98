"""Toys with every kind of loop over blocks that hosts use."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from toys import Block, Toy


class Keywords(Toy):
    def middle(self, h, c, context, t):
        for block in self.blocks:
            h = block(h=h, c=c)
        return h


class Streams(nn.Module):
    """A block of two streams, img and txt, which it takes and returns as the container `form`."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form, self.img, self.txt = form, Block(), Block()

    def forward(self, streams, c):
        if self.form == "dict":
            img, txt = streams["img"], streams["txt"]
            return {"img": self.img(img + txt.mean(1, keepdim=True), c), "txt": self.txt(txt, c)}
        img, txt = streams
        made = (self.img(img + txt.mean(1, keepdim=True), c), self.txt(txt, c))
        return made if self.form == "tuple" else list(made)


class InForm(Toy):
    form = "dict"

    def build(self):
        self.blocks = nn.ModuleList(Streams(self.form) for _ in range(4))

    def middle(self, h, c, context, t):
        streams = {"dict": {"img": h, "txt": context}, "tuple": (h, context), "list": [h, context]}[self.form]
        for block in self.blocks:
            streams = block(streams, c)
        return streams["img"] if self.form == "dict" else streams[0]


def in_form(form: str):
    return type(form, (InForm,), {"form": form})


class Odd(Block):
    """Returns None, a bool and a number besides its stream."""

    def forward(self, h, c):
        return h + self.change(h, c), None, True, 3.5


class OddOutputs(Toy):
    def build(self):
        self.blocks = nn.ModuleList(Odd() for _ in range(4))

    def middle(self, h, c, context, t):
        for block in self.blocks:
            h, _none, _flag, _number = block(h, c)
        return h


class Writing(Block):
    def forward(self, h, c):
        h += self.change(h, c)
        return h


class InPlace(Toy):
    def build(self):
        self.blocks = nn.ModuleList(Writing() for _ in range(4))

    def head(self, h, c, t):
        h *= 1.5  # what was kept must not be changed by this
        return super().head(h, c, t)


class InPlaceUnreturned(Toy):
    """Ignores what its blocks return and reads the tensor that they wrote into."""

    def build(self):
        self.blocks = nn.ModuleList(Writing() for _ in range(4))

    def middle(self, h, c, context, t):
        for block in self.blocks:
            block(h, c)
        return h


class Named(Toy):
    def build(self):
        self.blocks = nn.ModuleDict({f"layer{i}": Block() for i in range(4)})

    def middle(self, h, c, context, t):
        for block in self.blocks.values():
            h = block(h, c)
        return h


class One(Block):
    """A block of a Sequential: takes one tensor, whose first token is the condition."""

    def forward(self, h):
        return torch.cat((h[:, :1], super().forward(h[:, 1:], h[:, 0])), 1)


class InSequence(Toy):
    def build(self):
        self.blocks = nn.Sequential(*(One() for _ in range(4)))

    def middle(self, h, c, context, t):
        return self.blocks(torch.cat((c[:, None], h), 1))[:, 1:]


class Single(Toy):
    def build(self):
        self.blocks = nn.ModuleList([Block()])


class Nested(Toy):
    def build(self):
        self.blocks = nn.ModuleList(nn.ModuleList(Block() for _ in range(2)) for _ in range(3))

    def middle(self, h, c, context, t):
        for group in self.blocks:
            for block in group:
                h = block(h, c)
        return h


class Reversed(Toy):
    def middle(self, h, c, context, t):
        for block in reversed(self.blocks):
            h = block(h, c)
        return h


class InTurns(Toy):
    def build(self):
        self.others = nn.ModuleList(Block() for _ in range(4))

    def middle(self, h, c, context, t):
        for one, other in zip(self.blocks, self.others):
            h = other(one(h, c) * 1.0, c)
        return h


class Double(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.img, self.txt = Block(), Block()

    def forward(self, img, txt, c):
        return self.img(img + txt.mean(1, keepdim=True), c), self.txt(txt + img.mean(1, keepdim=True), c)


class Joint(Toy):
    """Has blocks of two streams, then blocks in which both streams are one."""

    txt_first = True

    def build(self):
        self.doubles = nn.ModuleList(Double() for _ in range(3))

    def middle(self, h, c, context, t):
        for block in self.doubles:
            h, context = block(h, context, c)
        length = context.shape[1]
        joint = torch.cat((context, h) if self.txt_first else (h, context), 1)
        for block in self.blocks:
            joint = block(joint, c)
        return joint[:, length:] if self.txt_first else joint[:, :-length]


class JointTxtLast(Joint):
    txt_first = False


class SameLength(Joint):
    """Has as many txt as img tokens. txt comes first everywhere."""

    def middle(self, h, c, context, t):
        return super().middle(h, c, functional.interpolate(context.mT, h.shape[1]).mT, t)


class SwappedReturn(InForm):
    """Has blocks that are given (img, txt) of equal lengths and return (txt, img)."""

    form = "tuple"

    def middle(self, h, c, context, t):
        context = functional.interpolate(context.mT, h.shape[1]).mT
        for block in self.blocks:
            context, h = reversed(block((h, context), c))
        return h


def leaving_out(*out: int) -> type[Toy]:
    """Returns a toy that leaves these blocks out, as skip-layer guidance does."""

    class LeavingOut(Toy):
        def middle(self, h, c, context, t):
            for i, block in enumerate(self.blocks):
                h = h if i in out else block(h, c)
            return h

    return LeavingOut

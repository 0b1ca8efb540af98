"""Toys whose streams, batches and lists have unusual shapes."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from toys import CHANNELS, WIDTH, Block, Toy, latent, text_of
from toys_in_loops import Double


class Grid(Toy):
    """Has tokens as (T, H, W, B, C), with T = 2 if there are two conds."""

    def build(self):
        self.blocks = nn.ModuleList(OfGrid() for _ in range(4))

    def middle(self, h, c, context, t):
        h = h.unflatten(1, (2, 3, 2)).permute(1, 2, 3, 0, 4)
        for block in self.blocks:
            h = block(h, c)
        return h.permute(3, 0, 1, 2, 4).flatten(1, 3)


class OfGrid(Block):
    def forward(self, h, c):
        flat = h.flatten(0, 2).movedim(1, 0)
        return super().forward(flat, c).movedim(0, 1).reshape(h.shape)


class Folded(Toy):
    """Folds frames into the batch, (B·T, L, C)."""

    outer = False

    def middle(self, h, c, context, t):
        rows = h.shape[0]
        h = h.unflatten(1, (3, 4))
        h = h.transpose(0, 1).flatten(0, 1) if self.outer else h.flatten(0, 1)
        c = c.repeat(3, 1) if self.outer else c.repeat_interleave(3, 0)
        for block in self.blocks:
            h = block(h, c)
        h = h.unflatten(0, (3, rows)).transpose(0, 1) if self.outer else h.unflatten(0, (rows, 3))
        return h.flatten(1, 2)


class FoldedOuter(Folded):
    """Folds frames into the batch with frames outermost, (T·B, L, C)."""

    outer = True


class Flat(nn.Module):
    """A block that gets all conds' tokens in one sequence, (L, C)."""

    def __init__(self) -> None:
        super().__init__()
        self.block = Block()

    def forward(self, h, c):
        return self.block(h[None], c.mean(0, keepdim=True))[0]


class Packed(Toy):
    """Puts text and image of each cond one after the other, in one stream without a batch. Texts have different lengths."""

    form = Flat
    txt_first = True

    def build(self):
        self.blocks = nn.ModuleList(self.form() for _ in range(4))

    def middle(self, h, c, context, t):
        parts, images, start = [], [], 0
        for image, text in zip(h, context):
            text = text[: 3 + 2 * int(text[0, 0])]
            parts += [text, image] if self.txt_first else [image, text]
            images.append(start + (len(text) if self.txt_first else 0))
            start += len(text) + len(image)
        joint = torch.cat(parts)
        for block in self.blocks:
            joint = block(joint, c)
        return torch.stack([joint[image : image + h.shape[1]] for image in images])


class PackedTxtLast(Packed):
    txt_first = False


class FlatApart(Flat):
    """Attends within each half of the sequence only."""

    def forward(self, h, c):
        return torch.cat([super(FlatApart, self).forward(part, row[None]) for part, row in zip(h.chunk(len(c)), c)])


class PackedEqually(Toy):
    """Puts conds of equal lengths one after the other and nothing else, so each cond's tokens can be found."""

    def build(self):
        self.blocks = nn.ModuleList(FlatApart() for _ in range(4))

    def middle(self, h, c, context, t):
        joint = h.flatten(0, 1)
        for block in self.blocks:
            joint = block(joint, c)
        return joint.unflatten(0, (len(c), -1))


def numbered(network, step, conds, plan):
    """Calls a network with each cond's number written into its text."""
    context = torch.cat([text_of(cond) for cond in conds])
    context[:, 0, 0] = torch.tensor(conds)
    return network(latent(step).repeat(len(conds), 1, 1), torch.full((len(conds),), 1 - step / len(plan)), context)


class SwappedInside(Toy):
    """Puts the second half of the batch first, and restores the order at the end."""

    def middle(self, h, c, context, t):
        h, c = (torch.cat(each.chunk(2)[::-1]) if each.shape[0] > 1 else each for each in (h, c))
        h = super().middle(h, c, context, t)
        return torch.cat(h.chunk(2)[::-1]) if h.shape[0] > 1 else h


class Anew(Toy):
    """Copies its streams after every block, so that no block is given the tensor that another one returned."""

    def build(self):
        self.blocks = nn.ModuleList(Double() for _ in range(4))

    def middle(self, h, c, context, t):
        for i, block in enumerate(self.blocks):
            h, context = block(h, context, c)
            if i == 0:
                h = h.clip(-1e4, 1e4).clone()
            joint = torch.cat((h, context), 1)
            h, context = joint.split((h.shape[1], context.shape[1]), 1)
        return h


class Lower(Toy):
    """Computes its blocks in another dtype than it answers in."""

    dtype = torch.bfloat16

    def build(self):
        self.blocks.to(self.dtype)

    def middle(self, h, c, context, t):
        return super().middle(h.to(self.dtype), c.to(self.dtype), context, t).float()


class Lower16(Lower):
    dtype = torch.float16


class Refined(Toy):
    """Has a refiner of the text and one of the image before the blocks."""

    def build(self):
        self.refiner = nn.ModuleList(Block() for _ in range(2))
        self.image_refiner = nn.ModuleList(Block() for _ in range(2))

    def middle(self, h, c, context, t):
        for block in self.refiner:
            context = block(context, c)
        for block in self.image_refiner:
            h = block(h, c)
        return super().middle(h + context.mean(1, keepdim=True), c, context, t)


class Pixels(Toy):
    """Has a head of small blocks, on many more tokens, after the main blocks."""

    def build(self):
        self.blocks = nn.ModuleList(Block() for _ in range(8))
        self.pixel_blocks = nn.ModuleList(Small() for _ in range(3))
        self.spread = nn.Linear(WIDTH, 8 * 8)
        self.from_pixels = nn.Linear(8, CHANNELS)

    def head(self, h, c, t):
        pixels = self.spread(h).unflatten(-1, (8, 8)).flatten(1, 2)
        for block in self.pixel_blocks:
            pixels = block(pixels)
        return self.from_pixels(pixels).unflatten(1, (-1, 8)).mean(2) + super().head(h, c, t)


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(8, 8)

    def forward(self, pixels):
        return pixels + self.layer(pixels).sin()


class Conditioning(Toy):
    """Has a list that makes the condition. The head reads the condition too, so this list must run."""

    def build(self):
        self.conditioner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))
        self.large = nn.Linear(WIDTH, WIDTH)

    def condition(self, t, context):
        c = super().condition(t, context)[:, None].repeat(1, 24, 1)
        for layer in self.conditioner:
            c = c + layer(c).sin()
        return c.mean(1)


class UShaped(Toy):
    """Passes the results of early blocks to late ones."""

    def build(self):
        self.blocks = nn.ModuleList([Block() for _ in range(3)] + [Late() for _ in range(3)])

    def middle(self, h, c, context, t):
        early: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            if i < 3:
                h = block(h, c)
                early.append(h)
            else:
                h = block(h, c, skip=early.pop())
        return h


class Late(Block):
    def __init__(self) -> None:
        super().__init__()
        self.join = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, h, c, skip=None):
        return super().forward(self.join(torch.cat((h, skip), -1)), c)


class UInTwo(Toy):
    """Does the same with two lists and a middle block between them."""

    def build(self):
        self.down = nn.ModuleList(Block() for _ in range(3))
        self.between = Block()
        self.blocks = nn.ModuleList(Late() for _ in range(3))

    def middle(self, h, c, context, t):
        early = []
        for block in self.down:
            h = block(h, c)
            early.append(h)
        h = self.between(h, c)
        for block in self.blocks:
            h = block(h, c, early.pop())
        return h


class Drop(Block):
    def build(self):
        pass

    def forward(self, h, c):
        return h + functional.dropout(self.change(h, c), 0.2, training=True)


class Dropping(Toy):
    """Has dropout in its blocks. A skip draws no random numbers for it."""

    def build(self):
        self.blocks = nn.ModuleList(Drop() for _ in range(4))


class Two(Toy):
    """Has a latent of two tensors of different lengths, which are one stream in the blocks."""

    def forward(self, x, t, context):
        first, second = x
        c = self.condition(t, context)
        h = super().middle(self.embed(torch.cat((first, second), 1)), c, context, t)
        return [self.head(h[:, : first.shape[1]], c, t), self.head(h[:, first.shape[1] :], c, t)]


def with_two(network, step, conds, plan):
    rows = len(conds)
    x = [latent(step).repeat(rows, 1, 1), latent(step, 5).repeat(rows, 1, 1)]
    return network(x, torch.full((rows,), 1 - step / len(plan)), torch.cat([text_of(cond) for cond in conds]))


class LastFeedsNothing(Toy):
    """Has a list after the last one that matters. Its result is not used."""

    def build(self):
        self.blocks = nn.ModuleList(Block() for _ in range(6))
        self.side = nn.ModuleList(Block() for _ in range(2))

    def head(self, h, c, t):
        side = h
        for block in self.side:
            side = block(side, c)
        return super().head(h, c, t)

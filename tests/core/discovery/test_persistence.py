"""A proof in one evaluation does not show that the next one has the same tokens, and what the cache does about it."""

from __future__ import annotations

import pytest
import torch
from comfyui_duca.cache_core.discovery.persistence import persists
from torch import nn
from toys import CHANNELS, PLAN, WIDTH, At, Case, Toy, distance, driven, referred, seeded, text_of
from toys_in_loops import Joint

MANY = 48


def latent(step: int) -> torch.Tensor:
    noise = torch.randn(2, 1, MANY, CHANNELS, generator=seeded(5))
    return noise[0] + (1 - step / 8) * noise[1]


def with_many(network, step, conds, plan):
    rows = len(conds)
    return network(latent(step).repeat(rows, 1, 1), torch.full((rows,), 1 - step / len(plan)), torch.cat([text_of(cond) for cond in conds]))


class Ordering(At):
    """Orders its tokens by the time before its blocks and restores the order right after them."""

    def middle(self, h, c, context, t):
        order = torch.randperm(h.shape[1], generator=seeded(self.step(t)))
        return super().middle(h[:, order], c, context, t)[:, order.argsort()]


@torch.inference_mode()
def hidden_of(network: nn.Module, step: int) -> torch.Tensor:
    kept = []
    with network.blocks[-1].register_forward_hook(lambda _module, _args, result: kept.append(result.clone())):
        with_many(network, step, (0, 1), PLAN)
    return kept[0]


@pytest.mark.parametrize("steps", [(0, 1), (0, 3), (3, 5), (0, 5)])
def test_tokens_in_another_order_are_seen(steps):
    plain, ordering = Toy(), Ordering()
    assert persists(*(hidden_of(plain, step) for step in steps))
    assert not persists(*(hidden_of(ordering, step) for step in steps))


def test_of_what_tells_nothing_nothing_is_concluded():
    before = torch.randn(1, 64, 8, generator=seeded(1))
    now = before.flip(1)
    answer = persists(before, now)
    assert answer.shape == () and answer.dtype == torch.bool and not answer
    assert not persists(before + 100, now + 100)  # all tokens have nearly the same values
    assert persists(before, before * 3 + 100)
    assert persists(before[:, :20], now[:, :20])
    assert persists(before, torch.full_like(now, float("nan")))
    assert persists(torch.ones_like(before), torch.ones_like(now))
    assert not persists(before.bfloat16(), now.bfloat16()) and persists(before.half(), before)


# -- runs that must not be wrong ------------------------------------------------------------------------


class Conditioning(At):
    """Has a list whose result the head reads, but not at the first step."""

    def build(self):
        self.conditioner = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def middle(self, h, c, context, t):
        side = c[:, None].repeat(1, 24, 1)
        for layer in self.conditioner:
            side = side + layer(side).sin()
        return super().middle(h, c, context, t) + (1 - t[:, None, None]) * side.mean(1, keepdim=True)


class EarlyRead(At):
    """Has a head that reads an early hidden state, but not at the first step."""

    def middle(self, h, c, context, t):
        early = None
        for block in self.blocks:
            h = block(h, c)
            early = h if early is None else early
        return h + (1 - t[:, None, None]) * early


class TextRead(Joint, At):
    """Has a head that reads the text, but not at the first step."""

    def middle(self, h, c, context, t):
        for block in self.doubles:
            h, context = block(h, context, c)
        joint = torch.cat((context, h), 1)
        for block in self.blocks:
            joint = block(joint, c)
        length = context.shape[1]
        return joint[:, length:] + (1 - t[:, None, None]) * joint[:, :length].mean(1, keepdim=True)


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(Case(Ordering, "blocks.3", call=with_many), id="tokens ordered by the time"),
        pytest.param(Case(Conditioning, "blocks.3"), id="conditioning"),
        pytest.param(Case(EarlyRead, "blocks.3"), id="early hidden"),
        pytest.param(Case(TextRead, "blocks.3", ("doubles", "blocks")), id="text"),
    ],
)  # fmt: skip
def test_right_from_the_second_full_evaluation_on(case):
    """From the second full evaluation on, answers are as if all blocks ran.

    Skips before it are wrong, which cannot be noticed. Another order of tokens can: the first skip of a run checks it.
    """
    network = case.make()
    found = driven(case, network)
    far = distance(found.answers, referred(case, network, "together", found.ran))
    assert max(far[0 if case.make is Ordering else 3 :]) < 1e-5
    if case.make is Ordering:
        assert found.ran == [{0, 1}] * len(PLAN) and any("another order" in notice for notice in found.notices)

"""Carries out a full evaluation: the host's own blocks run, and what later evaluations need is copied."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from ..families.shared.base import Site, Stack
from ..overrides import Forward, Override, around, forward_overrides, uncompiled
from .call import EngineCall
from .incremental import keeping_layers
from .slot import SiteKey


@contextmanager
def listening(call: EngineCall) -> Iterator[None]:
    """Keeps the last hidden state and what the call asks for besides.

    That is every sublayer's output for later conservative evaluations, and every linear layer's output and projected input for later
    incremental ones.
    """
    overrides: list[Override] = [*call.entry(), (call.last_block, around(after=call.remember_hidden))]
    if call.keeps_sublayers:
        for stack, index, block in call.family.placed(call.model):
            for site in stack.sites_of(block):
                key = (stack.path, index, site.key)
                overrides.append(_tap(call, stack, site, key, block))
                if site.key in call.rests:
                    overrides.append((attrgetter(site.module)(block), _resting(call, key)))
    overrides += keeping_layers(call)
    with nullcontext() if call.layers is None else uncompiled(), forward_overrides(overrides):
        yield


def _tap(call: EngineCall, stack: Stack, site: Site, key: SiteKey, block: nn.Module) -> Override:
    width = site.width(block) if site.width is not None else None

    def keep(tensor: Tensor) -> None:
        for slot, rows in zip(call.slots, call.rows(stack.flat(tensor)[..., :width])):
            slot.remember_sublayer(key, rows)

    module = attrgetter(site.module)(block)
    return module, around(before=_first_argument(keep)) if site.source == "input" else around(after=keep)


def _resting(call: EngineCall, key: SiteKey) -> Callable[[Forward], Forward]:
    """Makes a sublayer answer with its kept output instead of running."""

    def make(forward: Forward) -> Forward:
        def rested(*args: Any, **kwargs: Any) -> Any:
            if not args:
                return forward(*args, **kwargs)
            return torch.cat([slot.rest(key, args[0]) for slot in call.slots])  # always a copy: the host may write into it

        return rested

    return make


def resting(call: EngineCall) -> frozenset[str]:
    """Returns the keys of the sublayers that may rest in a full evaluation. Each rests in all blocks and slots or in none."""
    sites = [(site, (stack.path, i, site.key)) for stack, i, block in call.family.placed(call.model) for site in stack.sites_of(block)]
    rare = {site.key for site, _ in sites if site.every > 1}
    awake = {site.key for site, key in sites for slot in call.slots if site.key in rare and not slot.can_rest(key, site.every)}
    return frozenset(rare - awake)


def _first_argument(keep: Callable[[Tensor], None]) -> Callable[[tuple, dict[str, Any]], None]:
    return lambda args, kwargs: keep(args[0])

"""Carries out a conservative evaluation: every block is replayed from its kept sublayer outputs (DuCa, arXiv 2412.18911).

Attention comes from the cache, the MLP is recomputed for the chosen tokens and written back, and gates and shifts
are those of the current noise level. The arithmetic of a block is its family's `replay`.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn

from ..families.shared.base import Stack
from ..overrides import Forward, Override, around, forward_overrides
from ..refusals import UnsupportedCallError
from ..store import Feature, FeatureStore
from .call import EngineCall


class BlockFeatures:
    """Gives a block's replay its kept features, over all rows of a call (see `families.shared.base.Cached`).

    Args:
        call: The call.
        store: Holds the features.
        stack: The block's list.
        index: Index of the block there.
        blocks: Number of blocks there.
        like: Tensor whose dtype and device features are returned in.

    Raises:
        UnsupportedCallError: In every method that reads features, where a slot of the call keeps none under the key.
    """

    def __init__(self, call: EngineCall, store: FeatureStore, stack: Stack, index: int, blocks: int, like: Tensor) -> None:
        self._call, self._store, self._like = call, store, like
        self._stack, self._index, self._blocks = stack, index, blocks

    def all_tokens(self, key: str) -> Tensor:
        """Returns a feature for all tokens, (B, L, C)."""
        return _join([self._store.load(feature, self._like) for feature in self._features(key)])

    def some_tokens(self, key: str, tokens: Tensor) -> Tensor:
        """Returns a feature for the chosen tokens, (B, k, C)."""
        return _join([self._store.load_tokens(feature, tokens, self._like) for feature in self._features(key)])

    def refreshed(self, key: str, tokens: Tensor, fresh: Tensor) -> Tensor:
        """Overwrites the chosen tokens of a feature with `fresh` (B, k, C) and returns all tokens. A trial overwrites only a copy."""
        if self._call.is_trial:  # a sublayer's dtype may be shorter than that of the stream it is added to
            return self.all_tokens(key).index_copy(1, tokens, fresh.to(self._like.dtype))
        for feature, rows in zip(self._features(key), self._call.rows(fresh)):
            self._store.write_tokens(feature, tokens, rows)
        return self.all_tokens(key)

    def choose(self, stream: str, length: int) -> Tensor | None:
        """Returns the indices (k,) of the tokens that this block recomputes in a stream, None for none."""
        return self._call.selection.tokens(stream, self._index, self._blocks, length, self._like.device)

    def _features(self, key: str) -> list[Feature]:
        key_of_block = (self._stack.path, self._index, key)
        if not all(key_of_block in slot.sublayers for slot in self._call.slots):  # the host bypassed the module with a kernel of its own
            raise UnsupportedCallError(f"nothing is kept of {key} in {self._stack.path}.{self._index}")
        return [slot.sublayers[key_of_block] for slot in self._call.slots]


def conservative(call: EngineCall, store: FeatureStore) -> AbstractContextManager[None]:
    """Replays every block in place of the host's own.

    Every slot of the call must hold the sublayers of a full evaluation. The hidden state is kept as an anchor, as in the paper; a trial
    keeps nothing.

    Raises:
        UnsupportedCallError: In the host's call, where a family's replay refuses it or nothing is kept of a sublayer.
    """
    placed = call.family.placed(call.model)
    overrides: list[Override] = [(block, _replaying(call, store, stack, index, block)) for stack, index, block in placed]
    overrides += call.entry()
    overrides.append((call.last_block, around(after=call.is_answered if call.is_trial else call.remember_hidden)))
    return forward_overrides(overrides)


def _replaying(call: EngineCall, store: FeatureStore, stack: Stack, index: int, block: nn.Module) -> Any:
    blocks = len(stack.blocks(call.model))

    def replayed(*args: Any, **kwargs: Any) -> Any:
        named = stack.checked(args, kwargs)
        features = BlockFeatures(call, store, stack, index, blocks, stack.inputs(args, kwargs)[0])
        assert stack.replay is not None, "plans with conservative evaluations are refused for families without"
        with call.unrecorded():  # a replay makes new streams, where the host's block may write into those it was given
            return stack.result(stack.replay(block, named, features))

    def make(_forward: Forward) -> Forward:
        return replayed

    return make


def _join(parts: list[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)

"""Chooses the tokens that a conservative evaluation recomputes: a random share, as DuCa v2 found no score to be better."""

from __future__ import annotations

import torch
from torch import Tensor


class TokenSelection:
    """Chooses random tokens per block and stream, the same for every cond of one evaluation, whatever the batching.

    They are drawn on the CPU, so that the choice does not depend on the device.

    Args:
        share: Share of a stream's tokens, 0..1. Above 0, it is at least one token.
        seed: Makes runs repeatable.

    Raises:
        ValueError: Where the share is outside 0..1.
    """

    def __init__(self, share: float, seed: int) -> None:
        if not 0 <= share <= 1:
            raise ValueError(f"the token share must lie in 0..1, not {share}")
        self.share = share
        self._seed = seed
        self._evaluation = -1
        self._tables: dict[tuple, Tensor] = {}

    def begin(self, evaluation: int) -> None:
        """Begins an evaluation, which draws other tokens."""
        self._evaluation = evaluation
        self._tables.clear()

    def tokens(self, stream: str, block: int, blocks: int, length: int, device: torch.device) -> Tensor | None:
        """Returns the indices (k,) of the tokens for block `block` of `blocks`, in a stream of `length` tokens. None for none."""
        if self.share == 0:
            return None
        key = (stream, blocks, length, device)
        if key not in self._tables:
            count = max(1, round(self.share * length))
            generator = torch.Generator().manual_seed(self._seed_for(stream))
            order = torch.rand(blocks, length, generator=generator)
            self._tables[key] = order.topk(count, dim=1).indices.to(device, non_blocking=True)
        return self._tables[key][block]

    def _seed_for(self, stream: str) -> int:
        stream_number = int.from_bytes(stream.encode()[:4].ljust(4, b"\0"), "little")
        return (self._seed * 1_000_003 + self._evaluation * 7_919 + stream_number) % 2**63

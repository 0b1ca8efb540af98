"""The kinds of model evaluation."""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """What one model evaluation does. The value is its letter in plans, in schedules' text and on the wire to the page."""

    FULL = "F"  # every block runs: the host's own code, with what is needed later copied
    INCREMENTAL = "i"  # blocks run, with low-rank increments in place of their linear layers (ICC)
    CONSERVATIVE = "c"  # attention comes from the cache, the MLP runs for a share of the tokens (DuCa)
    SKIPPED = "a"  # no block runs, and the last hidden state is reused or forecast (DuCa calls this kind aggressive)

    @property
    def label(self) -> str:
        """The kind in words, for reports."""
        return self.name.lower()

"""The kinds of model evaluation."""

from __future__ import annotations

from enum import Enum


class Kind(Enum):
    """What one model evaluation does. The value is the letter of the kind in plans, in the text of schedules and in data for the page."""

    FULL = "F"  # every block of the host runs, and the cache copies what later evaluations need
    INCREMENTAL = "i"  # blocks run, but each linear layer answers with its kept output plus a low-rank increment (ICC)
    CONSERVATIVE = "c"  # attention comes from the cache, and the MLP runs for a share of the tokens (DuCa)
    SKIPPED = "a"  # no block runs, and the last hidden state is reused or forecast (called aggressive in DuCa's paper)

    @property
    def label(self) -> str:
        """The name of the kind in reports."""
        return self.name.lower()

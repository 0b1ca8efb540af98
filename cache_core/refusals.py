"""Why a call of the model cannot be served from the cache: raised inside it, and answered by computing the call in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UnsupportedCallError(Exception):
    """A block was called in a way that a replay or a skip does not know: compute this call in full instead."""


class UnsteadyError(UnsupportedCallError):
    """Tokens do not lie where they lay before: what is kept of one evaluation is no use in another."""


class UnknownInputError(UnsupportedCallError):
    """What the model was given cannot be told from what it added before its blocks."""


class ModelFailedError(UnsupportedCallError):
    """The host's own code failed on what a skip or a replay gave it."""


_FAILURES = (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, NotImplementedError)


@contextmanager
def failures_refused() -> Iterator[None]:
    """Around the host's code in a call that need not succeed: its errors become ModelFailedError. A lack of memory is raised as it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        raise ModelFailedError(f"{type(error).__name__}: {error}") from error

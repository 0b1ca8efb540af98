"""Errors that say why the cache cannot answer a model call. They are raised inside the host's call, which is then computed in full."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


class UnsupportedCallError(Exception):
    """A block was called in a way that the evaluation of this kind does not know. The call is computed in full instead."""


class UnsteadyError(UnsupportedCallError):
    """The tokens do not lie where they lay before, so what is kept of one evaluation cannot be used in another."""


class UnknownInputError(UnsupportedCallError):
    """The model's input could not be noted where the family says it enters, or its tokens are not those of the hidden state."""


class ModelFailedError(UnsupportedCallError):
    """The host's own code failed on what a skip or a replay gave it."""


_FAILURES = (LookupError, TypeError, ValueError, AttributeError, AssertionError, RuntimeError, NotImplementedError)


@contextmanager
def failures_refused() -> Iterator[None]:
    """Turns errors of the host's code into ModelFailedError, in calls that need not succeed. A lack of memory is raised as it is."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except _FAILURES as error:
        raise ModelFailedError(f"{type(error).__name__}: {error}") from error

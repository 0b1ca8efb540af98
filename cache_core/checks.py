"""Checks the values of settings and refuses wrong ones with a message for the user.

A link may bring a node a value of any type, and a NaN is not caught by a test such as `value < 1`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Checks that `value` is a finite number from `least` to `most`, both included.

    Args:
        name: What the message calls the value.

    Raises:
        ValueError: If it is not.
    """
    is_number = isinstance(value, Real) and not isinstance(value, bool) and value == value and abs(value) != math.inf
    if not is_number or not least <= value <= most:
        raise ValueError(f"{name} must be a number{_range(least, most)}, not {_shown(value)}")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a whole number of at least 0."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number that is not negative, not {_shown(value)}")


def check_one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises ValueError, which lists the options, unless `value` is one of the texts in `known`."""
    options = tuple(known)
    if value not in options:
        raise ValueError(f"unknown {name} {_shown(value)}: use one of {', '.join(options)}")


def check_type(name: str, value: Any, kind: type, source: str) -> None:
    """Checks that `value` is None or of type `kind`.

    Args:
        name: What the message calls the value.
        source: The node whose output is of that type, for the message.

    Raises:
        ValueError: If it is neither.
    """
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} must be connected to the output of {source}, not {_shown(value)}")


def _range(least: float, most: float) -> str:
    """Returns the allowed range as a part of a message."""
    if most == math.inf:
        return "" if least == -math.inf else f" of at least {least:g}"
    return f" from {least:g} to {most:g}"


def _shown(value: Any) -> str:
    """Returns the value as text, cut to 40 characters."""
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

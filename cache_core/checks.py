"""Refuses, in words, values that are not of the kind a setting takes: links bring nodes anything, and a NaN passes every comparison."""

from __future__ import annotations

import math
from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any


def check_number(name: str, value: Any, least: float = -math.inf, most: float = math.inf) -> None:
    """Raises ValueError unless `value` is a finite number from `least` to `most`."""
    is_number = isinstance(value, Real) and not isinstance(value, bool) and value == value and abs(value) != math.inf
    if not is_number or not least <= value <= most:
        raise ValueError(f"{name} must be a number{_range(least, most)}, not {_shown(value)}")


def check_count(name: str, value: Any) -> None:
    """Raises ValueError unless `value` is a whole number from 0 on."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < 0:
        raise ValueError(f"{name} must be a whole number that is not negative, not {_shown(value)}")


def check_one_of(name: str, value: Any, known: Iterable[str]) -> None:
    """Raises ValueError unless `value` is one of the texts in `known`."""
    options = tuple(known)
    if value not in options:
        raise ValueError(f"unknown {name} {_shown(value)}: use one of {', '.join(options)}")


def check_type(name: str, value: Any, kind: type, source: str) -> None:
    """Raises ValueError unless `value` is None or a `kind`; source: which node gives one."""
    if value is not None and not isinstance(value, kind):
        raise ValueError(f"{name} takes what {source} gives, not {_shown(value)}")


def _range(least: float, most: float) -> str:
    if most == math.inf:
        return "" if least == -math.inf else f" of at least {least:g}"
    return f" from {least:g} to {most:g}"


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}…"

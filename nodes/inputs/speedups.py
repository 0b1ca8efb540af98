"""Reads the list of speed-ups that a user writes into Cache Sweep."""

from __future__ import annotations

FASTEST, MOST = 6, 12  # the highest speed-up, and the largest number of them


def parse_speedups(text: str) -> list[float]:
    """Returns the numbers of a list such as "1.5, 2, 2.8", each once. 1 is left out, as a run without a cache is sampled anyway.

    Raises:
        ValueError: With a message for the user that names what is wrong.
    """
    pieces = [piece.strip() for piece in text.replace("\n", ",").split(",") if piece.strip()]
    if len(pieces) > MOST:
        raise ValueError(f"speedups has {len(pieces)} numbers; at most {MOST} are sampled at once")
    speeds = [_speedup(piece) for piece in pieces]
    wanted = list(dict.fromkeys(speed for speed in speeds if speed > 1))
    if not wanted:
        raise ValueError(f"speedups ({text.strip()!r}) needs at least one number above 1, such as: 1.5, 2, 2.8")
    return wanted


def _speedup(piece: str) -> float:
    try:
        value = float(piece)
    except ValueError:
        raise ValueError(f"speedups: {piece!r} is not a number; write for example: 1.5, 2, 2.8") from None
    if not 1 <= value <= FASTEST:
        raise ValueError(f"speedups: {piece!r} is not between 1 and {FASTEST}")
    return value

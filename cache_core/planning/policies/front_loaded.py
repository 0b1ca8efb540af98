"""The policy of mode auto: nested plans with more full steps at the beginning of a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from ..plan import Plan
from .base import Request, check_counts

_COARSE = 4  # distance of the full steps that come first in the order
_LAST = 0.1  # the last step of the run comes into the order when the even steps have reached this part of the run
_ODD = 0.26  # the odd steps begin when the even steps have reached this part of the run
_BEHIND = 5.5  # least number of steps by which the odd steps come after the even ones, which matters in short runs


@dataclass(frozen=True)
class FrontLoaded:
    """Makes the first steps of one fixed order full, as many as the budget allows.

    The order has the coarsest steps first (every 8th step, then every 4th), each group from the beginning of the run. Then come the even
    steps, soon the last step of the run, and more slowly the odd steps. A smaller budget takes less of the same list, so plans are nested.

    This way gaps hardly ever shrink (after a short gap no forecast reaches far), the beginning of the run is dense if the budget is large,
    and the final latent comes from a full evaluation where the budget allows. Compared with gaps that were chosen for each speed alone,
    which are not nested, these plans gain -0.6 to +2.4 dB on the demo model with 28 steps and lose 0.9 to 1.9 dB with 12 steps
    (docs/benchmarks.md). docs/method.md, section 5.1, has the order in detail.

    Args:
        speedup: Steps divided by full evaluations, at least 1. The budget is `round(steps / speedup)` and at least 2.
        warmup, tail: Full steps at the beginning and at the end of the run. They count towards the budget.

    Raises:
        ValueError: For a `speedup` below 1 or a negative number of steps.
    """

    about: ClassVar[str] = "more full steps at the beginning; a higher speed only takes some of them away"
    takes: ClassVar[frozenset[str]] = frozenset({"speedup"})

    speedup: float = 2.0
    warmup: int = 1
    tail: int = 0

    def __post_init__(self) -> None:
        if self.speedup < 1:
            raise ValueError(f"speedup must be at least 1, not {self.speedup}")
        check_counts(self.warmup, self.tail)

    @classmethod
    def asked(cls, request: Request) -> FrontLoaded:
        return cls(request.speedup, request.warmup, request.tail)

    def plan(self, steps: int, window: range) -> Plan:
        first = max(window.start, self.warmup - 1, 0)  # the last of the leading full steps starts the gaps
        end = min(window.stop, steps - self.tail)
        free = sorted(range(first + 1, end), key=lambda step: _turn(step - first, end - first, is_last=step == steps - 1))
        full = {*range(min(first + 1, steps)), *range(max(end, 0), steps)}
        full.update(free[: max(0, max(2, round(steps / self.speedup)) - len(full))])
        return Plan.with_full(full, steps)


def _turn(distance: int, length: int, is_last: bool) -> tuple[int, float]:
    """Returns the key of a step in the order: a step with a lower key becomes full first.

    Args:
        distance: Steps from the last of the leading full steps.
        length: Steps from there to the end of the window.
        is_last: Whether it is the last step of the run.
    """
    part, spacing = distance / length, distance & -distance  # spacing: the largest power of two that divides distance
    if spacing >= _COARSE:
        return -spacing, part
    if is_last:  # it gains less directly after a coarse step
        return 0, _LAST if distance % _COARSE > 1 else max(2 * _LAST, (0.5 + _BEHIND) / length)
    if spacing == 2:
        return 0, part
    return 0, max(_ODD + 4 * part**1.5, (distance + _BEHIND) / length)

"""The text form of a schedule: letters of kinds, repeats and groups, for runs of any length.

    F c a c a          a cycle, repeated to the end of the run
    3F (Faa)* F        three full steps, then a cycle as often as it fits, and a full step at the very end
    2(F2a)             the same as F a a F a a

A number repeats the letter or group after it. `*` repeats the letter or group before it as often as the rest of the text leaves room.
Without a `*` the whole text is a cycle. X may be written for F. Spaces are ignored.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from types import MappingProxyType

from .kinds import Kind

_LETTERS = MappingProxyType({**{kind.value: kind for kind in Kind}, "X": Kind.FULL})
_MOST = 10_000  # steps that a text may stand for; no run is that long
_LONGEST = 2 * _MOST  # characters of a text: as many letters with a space after each
_DEEPEST = 50  # nested groups: far more than a schedule needs, and far below Python's recursion limit
_SHOWN = 40  # characters of a long text that an error shows before and after the position


class ScheduleTextError(ValueError):
    """Says what is wrong with the text of a schedule.

    Attributes:
        text: The text.
        position: Index of the wrong character, from 0; `len(text)` for the end.
    """

    def __init__(self, problem: str, text: str, position: int) -> None:
        shown = repr(text[position]) if position < len(text) else "the end"
        first, last = max(0, position - _SHOWN), position + _SHOWN
        excerpt = f"{'…' if first else ''}{text[first:last]}{'…' if last < len(text) else ''}"
        super().__init__(f"{problem} (at {shown}, character {position + 1} of {excerpt!r})")
        self.text, self.position = text, position


@dataclass(frozen=True)
class Pattern:
    """A schedule for runs of any length.

    Args:
        head: Kinds of the first steps.
        loop: Kinds that are repeated between head and tail as often as they fit; the last repeat may be cut short.
        tail: Kinds of the last steps.
    """

    head: tuple[Kind, ...]
    loop: tuple[Kind, ...]
    tail: tuple[Kind, ...] = ()

    def fit(self, steps: int) -> tuple[Kind, ...]:
        """Returns the kind of each of `steps` steps.

        In a run that is too short for head and tail, the head is cut first. The first step is always full.
        """
        tail = self.tail[max(0, len(self.tail) - steps) :]
        head = self.head[: steps - len(tail)]
        between = steps - len(tail) - len(head)
        kinds = (*head, *islice(cycle(self.loop), between), *tail)
        return (Kind.FULL, *kinds[1:]) if steps else ()

    def has(self, kind: Kind) -> bool:
        return kind in (*self.head, *self.loop, *self.tail)

    def mapping(self, steps: int) -> str:
        """Returns a sentence for the user: how the text fills `steps` steps."""
        fixed = len(self.head) + len(self.tail)
        if steps < fixed:
            return f"the text names {fixed} steps, this run has {steps}: its beginning is cut short"
        times = (steps - fixed) / len(self.loop)
        return f"{len(self.head)} steps, then {len(self.loop)} repeated {times:.3g} times, then {len(self.tail)}, in {steps} steps"


def parse(text: str) -> Pattern:
    """Reads the text of a schedule.

    Raises:
        ScheduleTextError: If the text cannot be read.
        ValueError: If `text` is no string.
    """
    if not isinstance(text, str):
        raise ValueError(f"a schedule is written as text, not as {text!r:.40}")
    if len(text) > _LONGEST:
        raise ScheduleTextError(f"a schedule has at most {_LONGEST} characters", text, _LONGEST)
    return _Reader(text).pattern()


class _Reader:
    """Reads a text from left to right. `_at` is the position of the next character, `_depth` the number of open groups."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def pattern(self) -> Pattern:
        """Reads the whole text: the kinds before, in and after the part that a `*` repeats."""
        head: list[Kind] = []
        loop: list[Kind] | None = None
        tail: list[Kind] = []
        while (position := self._skip_spaces()) < len(self._text):
            if self._text[position] == ")":
                raise self._error("this ) has no matching (", position)
            kinds = self._item()
            if self._takes("*"):
                if loop is not None:
                    raise self._error("only one part of a schedule can be repeated with *", self._at - 1)
                loop = kinds
            else:
                (head if loop is None else tail).extend(kinds)
            if len(head) + len(loop or ()) + len(tail) > _MOST:
                raise self._error(f"up to here this makes more than {_MOST} steps", position)
        everything = [*head, *(loop or ()), *tail]
        if not everything:
            raise self._error("a schedule needs at least one letter: F, i, c or a", len(self._text))
        if everything[0] is not Kind.FULL:
            first = next(i for i, letter in enumerate(self._text) if letter in _LETTERS)
            raise self._error("the first step must be full (F): there is nothing to reuse yet", first)
        return Pattern((), tuple(head)) if loop is None else Pattern(tuple(head), tuple(loop), tuple(tail))

    def _item(self) -> list[Kind]:
        """Reads a letter or a group, with the number before it."""
        count = self._number()
        position = self._skip_spaces()
        if position >= len(self._text):
            raise self._error("a number must be followed by a letter or a group", position)
        kinds = self._group() if self._takes("(") else [self._letter()]
        if count * len(kinds) > _MOST:
            raise self._error(f"this makes more than {_MOST} steps", position)
        return kinds * count

    def _number(self) -> int:
        """Reads a number; 1 where there is none."""
        start = self._skip_spaces()
        while self._at < len(self._text) and self._text[self._at] in "0123456789":
            self._at += 1
        if self._at == start:
            return 1
        if self._at - start > len(str(_MOST)) or not (count := int(self._text[start : self._at])):
            raise self._error("a repeat must be a number from 1 up to a run's length", start)
        return count

    def _group(self) -> list[Kind]:
        """Reads a group after its opening parenthesis, up to and including the closing one."""
        opened, kinds = self._at - 1, []
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(f"groups can be nested at most {_DEEPEST} deep", opened)
        while not self._takes(")"):
            if self._skip_spaces() >= len(self._text):
                raise self._error("this ( is never closed", opened)
            kinds += self._item()
            if self._takes("*"):
                raise self._error("* stands after a whole group, not inside one", self._at - 1)
            if len(kinds) > _MOST:
                raise self._error(f"this makes more than {_MOST} steps", opened)
        if not kinds:
            raise self._error("this group is empty", opened)
        self._depth -= 1
        return kinds

    def _letter(self) -> Kind:
        letter = self._text[self._at]
        if letter not in _LETTERS:
            raise self._error("use the letters F (full), i (incremental), c (conservative), a (skipped), numbers, ( ) and *", self._at)
        self._at += 1
        return _LETTERS[letter]

    def _takes(self, character: str) -> bool:
        """Skips spaces and then `character`, and returns whether it was there."""
        found = self._text.startswith(character, self._skip_spaces())
        self._at += found
        return found

    def _skip_spaces(self) -> int:
        """Skips spaces and returns the position after them."""
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._at

    def _error(self, problem: str, position: int) -> ScheduleTextError:
        return ScheduleTextError(problem, self._text, position)

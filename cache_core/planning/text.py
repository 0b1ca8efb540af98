"""A schedule as people write it: letters of kinds, repeats and groups, for runs of any length.

    F c a c a          a cycle, repeated to the end of the run
    3F (Faa)* F        three full steps, then a cycle as often as it fits, and a full step at the very end
    2(F2a)             the same as F a a F a a

A number repeats what follows it, `*` repeats what stands before it until the rest of the text just fits. Without a `*` the whole text is a
cycle. X may be written for F. Spaces do not count.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import cycle, islice
from types import MappingProxyType

from .kinds import Kind

_LETTERS = MappingProxyType({**{kind.value: kind for kind in Kind}, "X": Kind.FULL})
_MOST = 10_000  # letters that a text may stand for: no run is that long
_LONGEST = 2 * _MOST  # characters: so many letters with a space after each
_DEEPEST = 50  # groups in each other: far more than a schedule needs, and far from the end of Python's stack
_SHOWN = 40  # characters of a long text before and after a wrong one


class ScheduleTextError(ValueError):
    """What is wrong with a schedule's text. position: of the character, from 0."""

    def __init__(self, problem: str, text: str, position: int) -> None:
        shown = repr(text[position]) if position < len(text) else "the end"
        first, last = max(0, position - _SHOWN), position + _SHOWN
        excerpt = f"{'…' if first else ''}{text[first:last]}{'…' if last < len(text) else ''}"
        super().__init__(f"{problem} (at {shown}, character {position + 1} of {excerpt!r})")
        self.text, self.position = text, position


@dataclass(frozen=True)
class Pattern:
    """head, then loop as often as it fits (its last time cut short), then tail."""

    head: tuple[Kind, ...]
    loop: tuple[Kind, ...]
    tail: tuple[Kind, ...] = ()

    def fit(self, steps: int) -> tuple[Kind, ...]:
        """The kind of each of `steps` steps. In a run too short for head and tail, the head is cut first. The first step is always full."""
        tail = self.tail[max(0, len(self.tail) - steps) :]
        head = self.head[: steps - len(tail)]
        between = steps - len(tail) - len(head)
        kinds = (*head, *islice(cycle(self.loop), between), *tail)
        return (Kind.FULL, *kinds[1:]) if steps else ()

    def has(self, kind: Kind) -> bool:
        return kind in (*self.head, *self.loop, *self.tail)

    def mapping(self, steps: int) -> str:
        """In words, how the text comes to `steps` steps."""
        fixed = len(self.head) + len(self.tail)
        if steps < fixed:
            return f"the text names {fixed} steps, this run has {steps}: its beginning is cut short"
        times = (steps - fixed) / len(self.loop)
        return f"{len(self.head)} steps, then {len(self.loop)} repeated {times:.3g} times, then {len(self.tail)}, in {steps} steps"


def parse(text: str) -> Pattern:
    """Raises ScheduleTextError, and ValueError for what is no text."""
    if not isinstance(text, str):
        raise ValueError(f"a schedule is written as text, not as {text!r:.40}")
    if len(text) > _LONGEST:
        raise ScheduleTextError(f"a schedule has at most {_LONGEST} characters", text, _LONGEST)
    return _Reader(text).pattern()


class _Reader:
    """Reads a text from left to right. Kinds are gathered in `_parts`: before, in and after what a `*` repeats."""

    def __init__(self, text: str) -> None:
        self._text, self._at, self._depth = text, 0, 0

    def pattern(self) -> Pattern:
        head: list[Kind] = []
        loop: list[Kind] | None = None
        tail: list[Kind] = []
        while (place := self._skip_spaces()) < len(self._text):
            if self._text[place] == ")":
                raise self._error("there is no ( that this ) would close", place)
            kinds = self._item()
            if self._takes("*"):
                if loop is not None:
                    raise self._error("only one part of a schedule can be repeated with *", self._at - 1)
                loop = kinds
            else:
                (head if loop is None else tail).extend(kinds)
            if len(head) + len(loop or ()) + len(tail) > _MOST:
                raise self._error(f"up to here this stands for more than {_MOST} steps", place)
        everything = [*head, *(loop or ()), *tail]
        if not everything:
            raise self._error("a schedule needs at least one letter: F, i, c or a", len(self._text))
        if everything[0] is not Kind.FULL:
            first = next(i for i, letter in enumerate(self._text) if letter in _LETTERS)
            raise self._error("the first step must be full (F): there is nothing to reuse yet", first)
        return Pattern((), tuple(head)) if loop is None else Pattern(tuple(head), tuple(loop), tuple(tail))

    def _item(self) -> list[Kind]:
        count = self._number()
        place = self._skip_spaces()
        if place >= len(self._text):
            raise self._error("a number must be followed by a letter or a group", place)
        kinds = self._group() if self._takes("(") else [self._letter()]
        if count * len(kinds) > _MOST:
            raise self._error(f"this stands for more than {_MOST} steps", place)
        return kinds * count

    def _number(self) -> int:
        start = self._skip_spaces()
        while self._at < len(self._text) and self._text[self._at] in "0123456789":
            self._at += 1
        if self._at == start:
            return 1
        if self._at - start > len(str(_MOST)) or not (count := int(self._text[start : self._at])):
            raise self._error("a repeat must be a number from 1 up to a run's length", start)
        return count

    def _group(self) -> list[Kind]:
        opened, kinds = self._at - 1, []
        self._depth += 1
        if self._depth > _DEEPEST:
            raise self._error(f"groups may stand in each other {_DEEPEST} deep", opened)
        while not self._takes(")"):
            if self._skip_spaces() >= len(self._text):
                raise self._error("this ( is never closed", opened)
            kinds += self._item()
            if self._takes("*"):
                raise self._error("* stands after a whole group, not inside one", self._at - 1)
            if len(kinds) > _MOST:
                raise self._error(f"this stands for more than {_MOST} steps", opened)
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
        """Steps over `character` where it comes next."""
        found = self._text.startswith(character, self._skip_spaces())
        self._at += found
        return found

    def _skip_spaces(self) -> int:
        while self._at < len(self._text) and self._text[self._at].isspace():
            self._at += 1
        return self._at

    def _error(self, problem: str, position: int) -> ScheduleTextError:
        return ScheduleTextError(problem, self._text, position)

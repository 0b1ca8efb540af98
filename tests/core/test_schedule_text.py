"""Schedules as text: examples worked out by hand, the wrong character is named, and any length of run is served."""

from __future__ import annotations

import pytest
from comfyui_duca.cache_core import Plan
from comfyui_duca.cache_core.planning.text import ScheduleTextError, parse


@pytest.mark.parametrize(
    ("text", "steps", "expected"),
    [
        ("F c a c a", 12, "FcacaFcacaFc"),
        ("3F (Xa)*", 9, "FFFFaFaFa"),
        ("3F (Faa)* F", 11, "FFFFaaFaaFF"),  # the loop is cut short, the tail is not
        ("3F (Faa)* F", 4, "FFFF"),
        ("3F (Faa)* F", 2, "FF"),  # too short for both: the head is cut
        ("2(F2a)", 8, "FaaFaaFa"),
        ("F2(ca)", 5, "Fcaca"),
        ("FaFaa", 5, "FaFaa"),
        ("FaFaa", 3, "FaF"),
        ("Fa*", 5, "Faaaa"),
        ("F 2(F(ai))* 2F", 9, "FFaiFaiFF"),
        ("F(F 2(ac))* ", 8, "FFacacFa"),
        (" F\ta\n", 4, "FaFa"),
        ("F * a", 4, "FFFa"),  # a star repeats what precedes it, also across a space
        ("(Fa)*", 1, "F"),
        ("F(aaF)*aa", 1, "F"),  # a run of one step is full, whatever the end of the text says
    ],
)
def test_hand_worked_texts(text, steps, expected):
    assert str(Plan(parse(text).fit(steps))) == expected


@pytest.mark.parametrize(
    ("text", "position", "word"),
    [
        ("F c b a", 4, "letters"),
        ("FaX!", 3, "letters"),
        ("f a", 0, "letters"),
        ("a F", 0, "first step"),
        ("  2(aF)", 4, "first step"),
        ("", 0, "at least one"),
        ("   ", 3, "at least one"),
        ("F 3", 3, "followed by"),
        ("F (aa", 2, "never closed"),
        ("F a)", 3, "no matching"),
        ("F ()", 2, "empty"),
        ("(Fa)* (ca)*", 10, "only one"),
        ("F (a*F)", 4, "after a whole group"),
        ("0F", 0, "from 1"),
        ("F 999999999a", 2, "from 1"),
        ("9999(9999F)", 4, "more than"),
        ("Fé", 1, "letters"),
        ("(" * 5000 + "F" + ")" * 5000, 50, "50 deep"),
        ("9999F " * 2, 6, "more than"),
        ("F " * 10_000 + "F", 20_000, "at most 20000 characters"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_the_wrong_character_is_named(text, position, word):
    with pytest.raises(ScheduleTextError, match=word) as caught:
        parse(text)
    assert caught.value.position == position and caught.value.text == text
    assert f"character {position + 1} of" in str(caught.value) and len(str(caught.value)) < 250


def test_groups_as_deep_as_they_may_be():
    assert str(Plan(parse("(" * 50 + "Fa" + ")" * 50).fit(4))) == "FaFa"
    assert str(Plan(parse("(Fa) " * 60).fit(4))) == "FaFa", "one after the other is not deep"


@pytest.mark.parametrize("text", [5, None, ["F"], b"F"])
def test_what_is_no_text(text):
    with pytest.raises(ValueError, match="written as text"):
        parse(text)

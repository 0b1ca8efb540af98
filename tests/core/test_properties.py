"""Properties of every policy, text of a schedule and predictor, for arbitrary arguments. Skipped without hypothesis."""

from __future__ import annotations

import numpy as np
import pytest
from comfyui_duca.cache_core import Kind, Plan
from comfyui_duca.cache_core.planning.policies import POLICIES, Patterned, Request
from comfyui_duca.cache_core.planning.text import ScheduleTextError, parse
from comfyui_duca.cache_core.predictors import PREDICTORS

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st


@given(
    steps=st.integers(1, 200),
    name=st.sampled_from(sorted(POLICIES)),
    start=st.integers(0, 200),
    length=st.integers(0, 200),
    speedup=st.floats(1, 10),
)
def test_every_policy_keeps_its_promises(steps, name, start, length, speedup):
    window = range(min(start, steps), min(start + length, steps))
    request = Request(steps, speedup, text="2F (Fca)* F", searched=lambda full: Plan.with_full(range(full), steps))
    plan = POLICIES[name].asked(request).plan(steps, window)
    assert len(plan) == steps
    assert plan[0] is Kind.FULL
    assert all(plan[i] is Kind.FULL for i in range(steps) if i not in window)
    assert Plan.parse(str(plan)) == plan


plans = st.lists(st.sampled_from("Fica"), max_size=199).map(lambda rest: Plan.parse("F" + "".join(rest)))


@given(plan=plans)
def test_a_plan_round_trips(plan):
    assert Plan.parse(str(plan)) == plan and parse(str(plan)).fit(len(plan)) == plan.kinds


items = st.recursive(
    st.tuples(st.integers(1, 3), st.sampled_from("FXica")).map(lambda item: f"{item[0]}{item[1]}"),
    lambda inner: st.tuples(st.integers(1, 3), st.lists(inner, min_size=1, max_size=3)).map(lambda g: f"{g[0]}({' '.join(g[1])})"),
    max_leaves=5,
)


@given(head=st.lists(items, max_size=3), loop=items, tail=st.lists(items, max_size=2), steps=st.integers(1, 200))
def test_any_text_fits_any_run(head, loop, tail, steps):
    text = f"F{''.join(head)}({loop})*{''.join(tail)}"
    pattern = parse(text)
    plan = pattern.fit(steps)
    assert len(plan) == steps and plan[0] is Kind.FULL
    if steps > len(pattern.head) + len(pattern.tail):
        assert plan[: len(pattern.head)] == pattern.head and plan[steps - len(pattern.tail) :] == pattern.tail
    assert str(steps) in pattern.mapping(steps)


@given(text=st.text(alphabet="Fcai X0123()*", max_size=30))
def test_nonsense_is_refused_in_words_or_read(text):
    try:
        pattern = parse(text)
    except ScheduleTextError as error:
        assert 0 <= error.position <= len(text)
    else:
        assert pattern.fit(7)[0] is Kind.FULL


@given(plan=plans, warmup=st.integers(0, 20), tail=st.integers(0, 20), start=st.integers(0, 20))
def test_warm_up_tail_and_window_are_full(plan, warmup, tail, start):
    steps = len(plan)
    fitted = Patterned(parse(str(plan)), warmup, tail).plan(steps, range(start, steps))
    for step, kind in enumerate(fitted.kinds):
        outside = step < warmup or step >= steps - tail or step < start
        assert kind is (Kind.FULL if outside else plan[step])


@given(
    name=st.sampled_from(sorted(PREDICTORS)),
    gaps=st.lists(st.floats(0.01, 0.2), min_size=1, max_size=8),
    ahead=st.floats(0.01, 0.2),
)
def test_weights_fit_the_history_and_stay_finite(name, gaps, ahead):
    predictor = PREDICTORS[name]()
    times = (1 - np.cumsum([0, *gaps]) / 2).tolist()[-predictor.history :]
    weights = predictor.weights(times, times[-1] - ahead / 2)
    assert len(weights) == len(times)
    assert np.isfinite(weights).all()
    if name != "chebyshev":  # its ridge changes the sum a little
        assert sum(weights) == pytest.approx(1.0)

"""Predictors give the weights that are worked out by hand, or that independent fits give."""

from __future__ import annotations

import numpy as np
import pytest
from comfyui_duca.cache_core.predictors import Chebyshev, Reuse, Taylor


def test_reuse_takes_the_last():
    assert Reuse().weights([0.9], 0.8) == [1.0]
    assert Reuse().weights([0.9, 0.7, 0.4], 0.1) == [0.0, 0.0, 1.0]


def test_taylor_of_first_order_is_a_line():
    """The line through (0.8, f) and (0.6, g) is g + (g - f) / 2 at 0.5."""
    assert Taylor(1).weights([0.8, 0.6], 0.5) == pytest.approx([-0.5, 1.5])
    assert Taylor(1).weights([1.0, 0.8, 0.6], 0.5) == pytest.approx([0.0, -0.5, 1.5])
    assert Taylor(1).weights([0.8], 0.5) == [1.0]


def test_taylor_of_second_order_is_a_parabola():
    """With even spacing, one step ahead, the weights are 1, -3 and 3."""
    assert Taylor(2).weights([0.9, 0.8, 0.7], 0.6) == pytest.approx([1.0, -3.0, 3.0])


@pytest.mark.parametrize("order", [1, 2])
def test_taylor_is_exact_on_polynomials_with_uneven_gaps(order):
    anchors, time = [0.95, 0.7, 0.6, 0.31], 0.17
    weights = Taylor(order).weights(anchors[-(order + 1) :], time)
    for power in range(order + 1):
        assert sum(w * t**power for w, t in zip(weights, anchors[-(order + 1) :])) == pytest.approx(time**power)


def test_chebyshev_is_the_ridge_fit_of_values():
    """The reference is a direct ridge regression: it minimises |Φc - f|² + λ|c|²."""
    anchors, time, values = [1.0, 0.9, 0.7, 0.5, 0.2], 0.1, np.array([3.0, -1.0, 2.0, 0.5, 4.0])
    basis = np.polynomial.chebyshev.chebvander(2 * np.array(anchors) - 1, 3)
    stacked = np.vstack((basis, np.sqrt(0.05) * np.eye(4)))
    coefficients = np.linalg.lstsq(stacked, np.concatenate((values, np.zeros(4))), rcond=None)[0]
    expected = np.polynomial.chebyshev.chebval(2 * time - 1, coefficients)
    weights = Chebyshev(degree=3, ridge=0.05, taylor_share=0.0).weights(anchors, time)
    assert np.dot(weights, values) == pytest.approx(expected)


def test_chebyshev_blends_in_the_line():
    anchors, time = [1.0, 0.8, 0.6], 0.5
    line, fit = Taylor(1).weights(anchors, time), Chebyshev(taylor_share=0.0).weights(anchors, time)
    blended = Chebyshev(taylor_share=0.25).weights(anchors, time)
    assert blended == pytest.approx([0.25 * a + 0.75 * b for a, b in zip(line, fit)])
    assert Chebyshev().weights(anchors[:2], time) == pytest.approx(Taylor(1).weights(anchors[:2], time))
    assert Chebyshev().weights(anchors[:1], time) == [1.0]


def test_a_bounded_line_is_held_beyond_its_reach():
    """Anchors are 0.2 apart and the reach is 0.5: the line is followed for 0.1, and is the same from 0.5 on."""
    bounded = Chebyshev(reach=0.5)
    assert bounded.weights([0.8, 0.6], 0.55) == pytest.approx([-0.25, 1.25])
    assert bounded.weights([0.8, 0.6], 0.5) == pytest.approx([-0.5, 1.5])
    assert bounded.weights([0.8, 0.6], 0.1) == pytest.approx([-0.5, 1.5])

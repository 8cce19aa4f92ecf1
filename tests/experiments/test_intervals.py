"""Intervals over seeds and over digits: by hand, by properties, against SciPy."""

import itertools
import math
import statistics

import pytest
from helpers.metrics import problems
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dbmtl.experiments.intervals import (
    Interval,
    delta_p_interval,
    interval,
)
from dbmtl.experiments.metrics import (
    delta_p,
)


@pytest.mark.parametrize("level", [95, 0.0, 1.0, -0.5, math.nan, "x"])
def test_interval_refuses_a_level_that_is_no_probability(level):
    with pytest.raises(ValueError, match="level must be a finite number above 0 and below 1"):
        interval([1.0, 2.0], level)


@settings(deadline=None, max_examples=30)
@given(st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=8), st.sampled_from([0.8, 0.95, 0.99]))
def test_interval_agrees_with_scipy(values, level):
    stats = pytest.importorskip("scipy.stats")
    assume(statistics.stdev(values) > 1e-6)
    low, high = stats.t.interval(level, len(values) - 1, statistics.mean(values), stats.sem(values))
    found = interval(values, level)
    assert (found.low, found.high, found.count) == (
        pytest.approx(low),
        pytest.approx(high),
        len(values),
    )
    assert found.half_width == pytest.approx((high - low) / 2)


def test_interval_of_equal_values_is_a_point():
    assert interval([2.0, 2.0, 2.0]) == Interval(2.0, 2.0, 2.0, 3)
    assert interval([2.0, 2.0]).sign == 1 and interval([0.0, 0.0]).sign == 0


@pytest.mark.parametrize(
    ("low", "high", "sign"), [(0.1, 1, 1), (-1, -0.1, -1), (-1, 1, 0), (0, 1, 0), (-1, 0, 0)]
)
def test_interval_sign(low, high, sign):
    assert Interval((low + high) / 2, low, high, 3).sign == sign


def test_interval_refuses_one_value_and_nan():
    with pytest.raises(ValueError, match="two numbers or more for an interval, got 1"):
        interval([1.0])
    with pytest.raises(ValueError, match="must be finite"):
        interval([1.0, math.nan])


@settings(deadline=None, max_examples=40)
@given(problems(), st.floats(0, 0.009), st.lists(st.floats(-1, 1), min_size=24, max_size=24))
def test_delta_p_interval_holds_everything_that_rounds_to_the_numbers(problem, half, shifts):
    ways, ours, base = problem
    halves = {t: dict.fromkeys(metrics, half) for t, metrics in ways.items()}
    low, high = delta_p_interval(ours, base, ways, halves, halves)
    turn = iter(shifts)

    def shifted(values):
        return {
            t: {m: v + half * next(turn) for m, v in metrics.items()}
            for t, metrics in values.items()
        }

    moved = shifted(ours), shifted(base)
    slack = 1e-9 * (1 + abs(low) + abs(high))
    assert low - slack <= delta_p(*moved, ways) <= high + slack


def test_delta_p_interval_is_reached_at_corners():
    ours, base = (
        {"a": {"x": 0.5, "y": -0.02}, "b": {"z": 3.0}},
        {"a": {"x": 0.4, "y": 0.3}, "b": {"z": 2.0}},
    )
    ways = {"a": {"x": "up", "y": "down"}, "b": {"z": "down"}}
    half, half_base = (
        {"a": {"x": 0.1, "y": 0.05}, "b": {"z": 0.5}},
        {"a": {"x": 0.05, "y": 0.1}, "b": {"z": 0.05}},
    )
    cells = [("a", "x"), ("a", "y"), ("b", "z")]
    corners = []
    for signs in itertools.product((-1, 1), repeat=6):
        moved, moved_base = {"a": {}, "b": {}}, {"a": {}, "b": {}}
        for (t, m), up, down in zip(cells, signs[:3], signs[3:], strict=True):
            moved[t][m] = ours[t][m] + up * half[t][m]
            moved_base[t][m] = base[t][m] + down * half_base[t][m]
        corners.append(delta_p(moved, moved_base, ways))
    found = delta_p_interval(ours, base, ways, half, half_base)
    assert found == (pytest.approx(min(corners)), pytest.approx(max(corners)))


def test_delta_p_interval_refuses_a_baseline_that_may_be_zero():
    ways, halves = {"a": {"x": "up"}}, {"a": {"x": 0.5}}
    with pytest.raises(ValueError, match="must be positive"):
        delta_p_interval({"a": {"x": 1.0}}, {"a": {"x": 0.5}}, ways, halves, halves)
    with pytest.raises(ValueError, match="results_half lacks 'a'"):
        delta_p_interval({"a": {"x": 1.0}}, {"a": {"x": 0.5}}, ways, {}, halves)


# ------------------------------------------------------------------------------- which epoch counts

"""Metrics of the exported package: by hand, by properties, against SciPy."""

import math

import pytest
from helpers.metrics import problems
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dbmtl.experiments.metrics import (
    check_results,
    delta_m,
    delta_p,
    delta_p_per_metric,
    delta_p_per_task,
    mean_rank,
    worst_task,
)

WAYS = {"segmentation": {"mIoU": "up", "PAcc": "up"}, "depth": {"AErr": "down"}}
STL = {"segmentation": {"mIoU": 50.0, "PAcc": 80.0}, "depth": {"AErr": 0.4}}
OURS = {"segmentation": {"mIoU": 55.0, "PAcc": 76.0}, "depth": {"AErr": 0.3}}


def test_delta_p_by_hand():
    # mIoU +10 %, PAcc -5 %; AErr 25 % smaller is better
    assert delta_p_per_metric(OURS, STL, WAYS) == {
        "segmentation": {"mIoU": pytest.approx(10), "PAcc": pytest.approx(-5)},
        "depth": {"AErr": pytest.approx(25)},
    }
    assert delta_p_per_task(OURS, STL, WAYS) == {
        "segmentation": pytest.approx(2.5),
        "depth": pytest.approx(25),
    }
    assert delta_p(OURS, STL, WAYS) == pytest.approx((2.5 + 25) / 2)
    assert delta_m(OURS, STL, WAYS) == pytest.approx(-(10 - 5 + 25) / 3)
    assert worst_task(OURS, STL, WAYS) == ("segmentation", pytest.approx(2.5))


@given(problems())
def test_delta_p_of_the_baseline_is_zero(problem):
    ways, ours, _ = problem
    assert delta_p(ours, ours, ways) == 0 and delta_m(ours, ours, ways) == 0


@given(problems(), st.randoms())
def test_delta_p_ignores_the_order_of_tasks_and_metrics(problem, random):
    def shuffled(tree):
        items = [(k, shuffled(v) if isinstance(v, dict) else v) for k, v in tree.items()]
        random.shuffle(items)
        return dict(items)

    ways, ours, base = problem
    for measure in (delta_p, delta_m):
        assert measure(shuffled(ours), shuffled(base), shuffled(ways)) == pytest.approx(
            measure(ours, base, ways)
        )


@given(problems(), st.floats(0.01, 100))
def test_delta_p_does_not_depend_on_units(problem, factor):
    ways, ours, base = problem

    def scaled(values):
        return {t: {m: v * factor for m, v in metrics.items()} for t, metrics in values.items()}

    assert delta_p(scaled(ours), scaled(base), ways) == pytest.approx(
        delta_p(ours, base, ways), abs=1e-9
    )


@given(problems())
def test_delta_p_changes_sign_with_every_direction(problem):
    ways, ours, base = problem
    turned = {
        t: {m: "down" if w == "up" else "up" for m, w in metrics.items()}
        for t, metrics in ways.items()
    }
    assert delta_p(ours, base, turned) == pytest.approx(-delta_p(ours, base, ways))


@given(problems())
def test_delta_p_lies_between_worst_and_best_task(problem):
    ways, ours, base = problem
    parts = delta_p_per_task(ours, base, ways)
    task, worst = worst_task(ours, base, ways)
    assert parts[task] == worst == min(parts.values())
    assert worst - 1e-9 <= delta_p(ours, base, ways) <= max(parts.values()) + 1e-9


@given(problems())
def test_delta_m_is_minus_delta_p_where_tasks_have_equally_many_metrics(problem):
    ways, ours, base = problem
    assume(len({len(metrics) for metrics in ways.values()}) == 1)
    assert delta_m(ours, base, ways) == pytest.approx(-delta_p(ours, base, ways), abs=1e-9)


BAD = {
    "results lacks 'depth'": ({"segmentation": OURS["segmentation"]}, STL, WAYS),
    "results lacks 'PAcc' of task 'segmentation'": (
        {**OURS, "segmentation": {"mIoU": 1.0}},
        STL,
        WAYS,
    ),
    "results has 'normal', for which directions has no entry": (
        {**OURS, "normal": {"mean": 1.0}},
        STL,
        WAYS,
    ),
    "baseline lacks 'depth'": (OURS, {"segmentation": STL["segmentation"]}, WAYS),
    "results['depth']['AErr'] is not finite: nan": (
        {**OURS, "depth": {"AErr": math.nan}},
        STL,
        WAYS,
    ),
    "baseline['depth']['AErr'] is not finite: inf": (
        OURS,
        {**STL, "depth": {"AErr": math.inf}},
        WAYS,
    ),
    "baseline['depth']['AErr'] must be positive, got 0": (
        OURS,
        {**STL, "depth": {"AErr": 0}},
        WAYS,
    ),
    "baseline['depth']['AErr'] must be positive, got -0.4": (
        OURS,
        {**STL, "depth": {"AErr": -0.4}},
        WAYS,
    ),
    "must be 'up' or 'down', got 'lower'": (OURS, STL, {**WAYS, "depth": {"AErr": "lower"}}),
    "directions is empty": ({}, {}, {}),
    "directions['depth'] is empty": ({**OURS, "depth": {}}, STL, {**WAYS, "depth": {}}),
}


@pytest.mark.parametrize("message", BAD)
@pytest.mark.parametrize(
    "measure", [delta_p_per_metric, delta_p_per_task, delta_p, delta_m, worst_task]
)
def test_delta_p_names_what_is_wrong(measure, message):
    with pytest.raises(ValueError) as error:
        measure(*BAD[message])
    assert message in str(error.value)


def test_check_results_names_its_argument():
    with pytest.raises(ValueError, match="results of EW lacks 'depth'"):
        mean_rank({"STL": STL, "EW": {"segmentation": STL["segmentation"]}}, WAYS)
    with pytest.raises(ValueError, match="my run lacks"):
        check_results({}, WAYS, "my run")


def test_mean_rank_by_hand_with_ties():
    table = {"a": STL, "b": OURS, "c": STL}
    # mIoU: b 1, a and c share 2 and 3; PAcc: a and c share 1 and 2, b 3;
    # AErr: b 1, a and c share 2 and 3
    assert mean_rank(table, WAYS) == {
        "a": pytest.approx((2.5 + 1.5 + 2.5) / 3),
        "b": pytest.approx((1 + 3 + 1) / 3),
        "c": pytest.approx((2.5 + 1.5 + 2.5) / 3),
    }


@settings(deadline=None)
@given(st.lists(st.integers(0, 4), min_size=1, max_size=6), st.sampled_from(["up", "down"]))
def test_mean_rank_agrees_with_scipy(values, better):
    rankdata = pytest.importorskip("scipy.stats").rankdata
    table = {f"method {k}": {"task": {"metric": value}} for k, value in enumerate(values)}
    expected = rankdata([-v if better == "up" else v for v in values], method="average")
    assert list(mean_rank(table, {"task": {"metric": better}}).values()) == pytest.approx(
        list(expected)
    )

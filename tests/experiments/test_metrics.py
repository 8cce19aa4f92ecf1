"""Metrics and intervals of the exported package: by hand, by properties, against SciPy."""

import itertools
import math
import statistics

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dbmtl.experiments.metrics import (
    Interval,
    check_results,
    delta_m,
    delta_p,
    delta_p_interval,
    delta_p_per_metric,
    delta_p_per_task,
    improvements,
    interval,
    mean_rank,
    paired_difference,
    select,
    student_t,
    worst_task,
)

WAYS = {"segmentation": {"mIoU": "up", "PAcc": "up"}, "depth": {"AErr": "down"}}
STL = {"segmentation": {"mIoU": 50.0, "PAcc": 80.0}, "depth": {"AErr": 0.4}}
OURS = {"segmentation": {"mIoU": 55.0, "PAcc": 76.0}, "depth": {"AErr": 0.3}}

numbers = st.floats(0.01, 100)


@st.composite
def problems(draw):
    """Directions, results and a baseline with one to four tasks of one to three metrics."""
    ways = {
        f"task {t}": {
            f"metric {m}": draw(st.sampled_from(["up", "down"]))
            for m in range(draw(st.integers(1, 3)))
        }
        for t in range(draw(st.integers(1, 4)))
    }
    values = [
        {t: {m: draw(numbers) for m in metrics} for t, metrics in ways.items()} for _ in range(2)
    ]
    return ways, *values


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


@pytest.mark.parametrize("degrees", [1, 2, 3, 4, 5, 6, 9, 10, 29, 30, 199, 1000])
@pytest.mark.parametrize("level", [0.01, 0.5, 0.8, 0.9, 0.95, 0.99, 0.999])
def test_student_t_agrees_with_scipy(level, degrees):
    distribution = pytest.importorskip("scipy.stats").t
    assert student_t(level, degrees) == pytest.approx(
        distribution.ppf((1 + level) / 2, degrees), rel=1e-8
    )


@pytest.mark.parametrize(
    ("level", "degrees", "message"),
    [
        (0, 2, "level must be a finite number above 0 and below 1, got 0"),
        (1.0, 2, "got 1.0"),
        (0.95, 0, "degrees must be a whole number from 1, got 0"),
        (0.95, 1.5, "got 1.5"),
    ],
)
def test_student_t_refuses(level, degrees, message):
    with pytest.raises(ValueError, match=message):
        student_t(level, degrees)


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


def test_paired_difference_pairs_by_seed_not_by_position():
    ours, theirs = {0: 1.0, 1: 5.0, 2: 9.0}, {2: 8.0, 0: 0.5, 1: 4.3}
    assert paired_difference(ours, theirs) == pytest.approx(interval([0.5, 0.7, 1.0]))
    assert paired_difference(theirs, ours).mean == pytest.approx(
        -paired_difference(ours, theirs).mean
    )
    with pytest.raises(ValueError, match=r"\[2, 3\] are in one of them only"):
        paired_difference(ours, {0: 0.5, 1: 4.3, 3: 1.0})


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


def rows(validation, test):
    both = zip(validation, test, strict=True)
    return [
        {
            "train": {},
            "validation": None if v is None else {"a": {"Acc": v}, "b": {"MAE": 1.0}},
            "test": {"a": {"Acc": t}, "b": {"MAE": t}},
        }
        for v, t in both
    ]


DIRECTIONS = {"a": {"Acc": "up"}, "b": {"MAE": "down"}}


def test_best_epoch_is_chosen_on_validation_and_reported_on_test():
    choice = select([rows([10, 30, 20, 30], [1, 2, 3, 4])], DIRECTIONS)
    best = choice["best validation epoch"]
    assert (best["epoch"], best["delta_p_over_first_epoch"]) == (
        2,
        100.0,
    )  # a: +200 %, b: 0; of equals the first
    assert best["test"] == {"a": {"Acc": 2}, "b": {"MAE": 2}}


def test_without_validation_the_label_says_test():
    choice = select([rows([None] * 3, [1.0, 4.0, 2.0])], DIRECTIONS)
    assert list(choice) == ["best test epoch", "average of the last ten epochs"]
    # a and b cancel: 0, then (300 - 300) / 2 = 0: the first of equals
    assert choice["best test epoch"]["epoch"] == 1
    assert choice["average of the last ten epochs"]["validation"] == {}


def test_average_is_of_the_last_ten_epochs():
    choice = select([rows(range(1, 13), range(1, 13))], DIRECTIONS)[
        "average of the last ten epochs"
    ]
    assert choice["epochs"] == 10 and choice["test"]["a"]["Acc"] == sum(range(3, 13)) / 10


def test_stl_networks_choose_their_epochs_one_by_one():
    parts = [
        [{"validation": {n: {"MAE": v}}, "test": {n: {"MAE": 10 * v}}} for v in values]
        for n, values in (("a", [3.0, 1.0, 2.0]), ("b", [3.0, 2.0, 1.0]))
    ]
    best = select(parts, {"a": {"MAE": "down"}, "b": {"MAE": "down"}})["best validation epoch"]
    assert best["epoch"] == {"a": 2, "b": 3} and best["test"] == {
        "a": {"MAE": 10.0},
        "b": {"MAE": 10.0},
    }


def test_a_metric_that_starts_at_zero_is_left_out_of_the_choice():
    given = rows([0.0, 50.0, 10.0], [1.0, 2.0, 3.0])
    given[2]["validation"]["b"]["MAE"] = 0.5
    assert improvements(given, DIRECTIONS) == [0.0, 0.0, 50.0]
    for row in given:
        row["validation"]["b"]["MAE"] = 0.0
    assert improvements(given, DIRECTIONS) == [0.0, 0.0, 0.0]

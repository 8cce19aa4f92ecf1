"""Both rules of the epoch, seed by seed, Holm's correction: by hand and against SciPy."""

import math

import pytest
from helpers.records import small_record
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dbmtl.experiments.intervals import Interval, interval
from dbmtl.report.fair_comparison import Comparison, holm, judged


def record(method, seed, best, last, state="finished"):
    """A run whose tasks a and b have these errors and accuracies, (a, b), by each rule."""

    def test(values):
        return {"test": {"a": {"MAE": values[0]}, "b": {"Acc": values[1]}}}

    selected = {}
    if state == "finished":
        selected = {
            "best validation epoch": {"epoch": 1} | test(best),
            "average of the last ten epochs": {"epochs": 3} | test(last),
        }
    return small_record(method, seed, selected, (9.0, 1.0), state)


def runs(method, best, last=None):
    """A run a seed, from pairs (error of a, accuracy of b)."""
    last = best if last is None else last
    return [
        record(method, seed, ours, average)
        for seed, (ours, average) in enumerate(zip(best, last, strict=True))
    ]


STL = runs("STL", [(1.0, 50.0), (2.0, 40.0), (1.0, 50.0)])
EW = runs("EW", [(0.9, 50.0), (1.8, 40.0), (0.8, 50.0)])


def test_a_run_is_compared_with_the_baselines_run_of_its_seed():
    comparison = Comparison([*STL, *EW])
    assert comparison.gains("best")["EW"] == pytest.approx({0: 5.0, 1: 5.0, 2: 10.0})
    assert comparison.task_gains("best")["EW"][2] == pytest.approx({"a": 20.0, "b": 0.0})
    assert comparison.gains("best")["STL"] == {0: 0.0, 1: 0.0, 2: 0.0}
    expected = interval([5.0, 5.0, 10.0])
    assert comparison.delta_p("EW") == pytest.approx(expected)


def test_seeds_that_the_baseline_lacks_are_left_out():
    comparison = Comparison([*STL[:2], *EW])
    assert set(comparison.gains("best")["EW"]) == {0, 1}
    alone = Comparison([STL[0], EW[1]])
    assert alone.delta_p("EW") == "no seed in common with STL"


def test_why_there_is_no_number():
    poor = runs("MGDA", [(9.0, 50.0)] * 3)  # task a at its floor
    lost = [record("CAGrad", 0, None, None, state="diverged")]
    comparison = Comparison([*STL, *poor, *lost])
    assert comparison.delta_p("MGDA") == "not trained: a"
    assert comparison.delta_p("CAGrad") == "diverged"
    assert comparison.delta_p("PCGrad") == "not run"
    assert comparison.difference("MGDA", "STL") is None
    assert Comparison(EW).delta_p("EW") == "STL not run"
    assert Comparison([]).scale == "not run"


def test_a_difference_by_both_rules_with_the_word_that_changes():
    close = [(0.9, 50.0), (1.9, 40.0), (1.1, 50.0)]
    better = [(0.5, 50.0), (1.0, 40.0), (0.51, 50.0)]
    comparison = Comparison([*STL, *runs("EW", close), *runs("DB-MTL", close, better)])
    verdict = comparison.verdict("DB-MTL", "EW", printed=25.0)
    assert verdict.intervals["best"] == Interval(0.0, 0.0, 0.0, 3)
    assert verdict.words["best"] == "undecided, another size"
    assert verdict.intervals["last ten"].sign == 1
    assert not verdict.agrees
    assert verdict.word.startswith("undecided, another size; by the last ten epochs same sign")


def test_a_verdict_where_both_rules_agree_is_one_word():
    better = runs("DB-MTL", [(0.5, 50.0), (1.0, 40.0), (0.51, 50.0)])
    comparison = Comparison([*STL, *EW, *better])
    verdict = comparison.verdict("DB-MTL", "EW", printed=-1.0)
    assert verdict.agrees and verdict.word == "opposite sign"
    assert comparison.verdict("DB-MTL", "PCGrad", printed=1.0).word == "not run"
    assert Comparison([*STL[:1], *EW[:1]]).verdict("EW", "STL", 1.0).word == "one run"


def test_differences_against_scipy_and_holm():
    better = [(0.5, 50.0), (1.0, 41.0), (0.51, 52.0)]
    worse = [(1.0, 40.0), (2.0, 35.0), (1.2, 45.0)]
    comparison = Comparison([*STL, *EW, *runs("DB-MTL", better), *runs("CAGrad", worse)])
    pairs = [("DB-MTL", "EW"), ("CAGrad", "EW"), ("DB-MTL", "CAGrad"), ("PCGrad", "EW")]
    table = comparison.differences(pairs)
    gains = comparison.gains("best")
    for row, (first, second) in enumerate(pairs[:3]):
        sample = [gains[first][seed] - gains[second][seed] for seed in range(3)]
        p = stats.ttest_1samp(sample, 0).pvalue
        assert table["p (best)"][row] == pytest.approx(p)
        assert (table["best"][row].sign != 0) == (p < 0.05)
    assert math.isnan(table["p (best)"][3]) and table["best"][3] is None
    assert not table["told apart"][3]
    for protocol in ("best", "last ten"):
        expected = holm(table[f"p ({protocol})"])
        assert table[f"p ({protocol}, Holm)"].tolist()[:3] == pytest.approx(expected[:3])
    assert (table["told apart"][:3] == (table["p (best, Holm)"][:3] < 0.05)).all()


def test_a_difference_that_only_one_rule_sees_is_not_told_apart():
    far = [(0.5, 50.0), (1.0, 40.0), (0.5001, 50.0)]
    near = [(0.9, 50.0), (1.81, 40.0), (0.8, 50.0)]
    comparison = Comparison([*STL, *EW, *runs("DB-MTL", far, near)])
    table = comparison.differences([("DB-MTL", "EW")])
    assert table["p (best)"][0] < 0.05 < table["p (last ten)"][0]
    assert not table["told apart"][0]


def test_opposite_signs_by_the_two_rules_are_not_told_apart():
    far = [(0.50, 50.0), (1.00, 40.0), (0.40, 50.0)]
    back = [(1.30, 50.0), (2.62, 40.0), (1.21, 50.0)]
    comparison = Comparison([*STL, *EW, *runs("DB-MTL", far, back)])
    table = comparison.differences([("DB-MTL", "EW")])
    assert (table[["p (best)", "p (last ten)"]] < 0.05).all(axis=None)
    assert not table["told apart"][0]


def test_the_noise_floor_is_the_largest_difference_of_twins():
    twin = runs("Nash-MTL", [(0.9, 50.0), (1.8, 40.0), (0.8, 50.0)])
    other = runs("Nash-MTL+log", [(0.9, 50.0), (1.8, 40.2), (0.81, 50.0)])
    comparison = Comparison([*STL, *twin, *other])
    assert comparison.noise_floor() == pytest.approx(0.5)
    assert math.isnan(Comparison(STL).noise_floor())


def test_it_shows_itself_as_a_table():
    poor = runs("MGDA", [(9.0, 50.0)] * 3)
    page = Comparison([*STL, *EW, *poor])._repr_html_()
    assert "<table" in page and "7 ± 7" in page and "not trained: a" in page
    assert "b (0.0 %)" in page


@given(st.lists(st.floats(0, 1), max_size=8))
def test_holm_is_never_below_p_and_keeps_the_order(p_values):
    adjusted = holm(p_values)
    assert len(adjusted) == len(p_values)
    for p, new in zip(p_values, adjusted, strict=True):
        assert p <= new <= 1 or math.isclose(p, new)
    ordered = sorted(zip(p_values, adjusted, strict=True))
    assert [new for _, new in ordered] == sorted(new for _, new in ordered)
    if p_values:
        bonferroni = min(1.0, len(p_values) * min(p_values))
        assert min(adjusted) == pytest.approx(bonferroni)


@pytest.mark.parametrize(
    "scale, measured, printed, word",
    [
        ("cpu", Interval(0.5, -1.0, 2.0, 3), 1.5, "undecided"),
        ("cpu", Interval(0.5, -1.0, 2.0, 3), 8.0, "undecided, another size"),
        ("cpu", Interval(0.5, 0.2, 0.8, 3), 8.0, "same sign, another size"),
        ("cpu", Interval(0.5, 0.2, 0.8, 3), 0.8, "same sign"),
        ("cpu", Interval(0.5, 0.2, 0.8, 3), -8.0, "opposite sign"),
        ("paper", Interval(0.5, 0.2, 0.8, 3), 0.4, "reproduced"),
        ("paper", Interval(0.5, 0.2, 0.8, 3), -0.4, "not reproduced"),
        ("cpu", Interval(0.5, -math.inf, math.inf, 1), 0.4, "one run"),
        ("cpu", Interval(0.5, 0.2, 0.8, 2), 8.0, "undecided"),
        ("smoke", Interval(0.5, 0.2, 0.8, 3), 8.0, "none"),
        ("cpu", None, 8.0, "not run"),
    ],
)
def test_words(scale, measured, printed, word):
    assert judged(scale, measured, printed) == word


def test_a_printed_difference_of_zero_has_no_sign():
    with pytest.raises(ValueError, match="printed must not be 0"):
        judged("cpu", None, 0.0)

"""Both rules of the epoch, seed by seed, Holm's correction: by hand, and against SciPy."""

import math

import numpy as np
import pytest
from helpers.records import small_record
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from dbmtl.experiments.epoch_selection import LAST_TEN
from dbmtl.experiments.intervals import Interval, interval
from dbmtl.experiments.metrics import delta_m, delta_p, delta_p_per_task, mean_rank
from dbmtl.experiments.paired_tests import p_value
from dbmtl.experiments.records import read_records, runs_folder, selected
from dbmtl.report.comparison import Comparison, estimate, holm, judged, minus, worst_in_words
from dbmtl.report.runs import current_records


def record(method, seed, best, last, state="finished", **changes):
    """A run whose tasks a and b have these errors and accuracies, (a, b), by each rule."""

    def test(values):
        return {"test": {"a": {"MAE": values[0]}, "b": {"Acc": values[1]}}}

    selections = {}
    if state == "finished":
        selections = {"average of the last ten epochs": {"epochs": 3} | test(last)}
        if best is not None:
            selections["best validation epoch"] = {"epoch": 1} | test(best)
    return small_record(method, seed, selections, (9.0, 1.0), state, **changes)


def runs(method, best, last=None):
    """A run a seed, from pairs (error of a, accuracy of b)."""
    last = best if last is None else last
    return [
        record(method, seed, ours, average)
        for seed, (ours, average) in enumerate(zip(best, last, strict=True))
    ]


def seeds(comparison, label, protocol="best", **which):
    return comparison.by_seed(protocol, **which)[label].dropna().to_dict()


STL = runs("STL", [(1.0, 50.0), (2.0, 40.0), (1.0, 50.0)])
EW = runs("EW", [(0.9, 50.0), (1.8, 40.0), (0.8, 50.0)])


def test_a_run_is_compared_with_the_baselines_run_of_its_seed():
    comparison = Comparison([*STL, *EW])
    assert seeds(comparison, "EW") == pytest.approx({0: 5.0, 1: 5.0, 2: 10.0})
    assert seeds(comparison, "EW", task="a")[2] == pytest.approx(20.0)
    assert seeds(comparison, "EW", task="b")[2] == 0.0
    assert seeds(comparison, "STL") == {0: 0.0, 1: 0.0, 2: 0.0}
    assert comparison.delta_p("EW") == pytest.approx(interval([5.0, 5.0, 10.0]))
    assert comparison.delta_p("EW", task="a") == pytest.approx(interval([10.0, 10.0, 20.0]))
    logs = seeds(comparison, "EW", task="a", score="log_ratio")
    assert logs == pytest.approx({0: -math.log(0.9), 1: -math.log(0.9), 2: -math.log(0.8)})


@pytest.mark.parametrize("protocol, rule", [("best", "best"), ("last ten", "last ten")])
def test_committed_records_give_what_the_metrics_give(protocol, rule):
    """Against the plain functions of experiments.metrics, run by run."""
    committed = read_records(runs_folder("paper"), benchmark="office31")
    records = current_records(committed, "office31", "cpu")
    comparison = Comparison(records)
    results = {}
    for run in records:
        config = run["config"]
        results.setdefault(config["method"], {})[config["seed"]] = selected(run, rule)
    directions = records[0]["directions"]
    means = {}
    for method, by_seed in results.items():
        for seed, run in by_seed.items():
            base = results["STL"][seed]
            assert seeds(comparison, method, protocol)[seed] == pytest.approx(
                delta_p(run, base, directions), abs=1e-9
            )
            assert comparison.delta_m(method, protocol)[seed] == pytest.approx(
                delta_m(run, base, directions), abs=1e-9
            )
            for task, percent in delta_p_per_task(run, base, directions).items():
                assert seeds(comparison, method, protocol, task=task)[seed] == pytest.approx(
                    percent, abs=1e-9
                )
        means[method] = {
            task: {
                metric: round(np.mean([run[task][metric] for run in by_seed.values()]), 9)
                for metric in ways
            }
            for task, ways in directions.items()
        }
    assert len(means) > 3
    del means["STL"]
    ranks = comparison.mean_ranks(protocol).to_dict()
    assert ranks == pytest.approx(mean_rank(means, directions))


def test_seeds_that_the_baseline_lacks_are_left_out():
    comparison = Comparison([*STL[:2], *EW])
    assert set(seeds(comparison, "EW")) == {0, 1}
    alone = Comparison([STL[0], EW[1]])
    assert alone.delta_p("EW") == "no seed in common with STL"
    assert alone.difference("EW", "STL") == "EW no seed in common with STL"


def test_gains_over_the_floor_by_hand():
    """Floors are an error of 9 and an accuracy of 1; both gains are positive where it is better."""
    comparison = Comparison([*STL, *runs("MGDA", [(9.0, 0.5), (18.0, 2.0)])])
    above = comparison.above_floor()
    assert above["STL"].to_dict() == pytest.approx(
        {"a": 100 * np.mean([8 / 9, 7 / 9, 8 / 9]), "b": 100 * np.mean([49, 39, 49])}
    )
    assert above["MGDA"].to_dict() == pytest.approx({"a": -50.0, "b": 25.0})
    failed = record("CAGrad", 0, None, None, state="diverged")
    with_failed = Comparison([*STL, failed, *EW]).above_floor("last ten")
    assert list(with_failed.columns) == ["STL", "EW"] and list(with_failed.index) == ["a", "b"]
    assert Comparison([]).above_floor().empty


def test_gains_over_the_floor_have_the_sign_of_each_metric():
    """A mean of ratios of an error and of an accuracy would say nothing."""
    measured = {"angle": 30.0, "share": 25.0}
    both = record("EW", 0, None, (0.0, 0.0)) | {
        "directions": {"a": {"angle": "down", "share": "up"}},
        "floors": {"test": {"a": {"angle": 40.0, "share": 20.0}}},
        "selected": {LAST_TEN: {"epochs": 3, "test": {"a": measured}}},
    }
    above = Comparison([both]).above_floor("last ten")
    assert above["EW"].to_dict() == pytest.approx({"a": 25.0})  # both are a quarter better


def test_why_there_is_no_number():
    poor = runs("MGDA", [(9.0, 50.0), (1.0, 50.0), (1.0, 50.0)])  # task a at its floor, in one run
    lost = [record("CAGrad", 0, None, None, state="diverged")]
    comparison = Comparison([*STL, *poor, *lost])
    assert comparison.untrained == {("MGDA", "best"): ["a"], ("MGDA", "last ten"): ["a"]}
    assert comparison.delta_p("MGDA") == "not trained: a"
    assert comparison.delta_p("MGDA", task="a") == "at its floor"
    assert comparison.delta_p("MGDA", task="b").count == 3
    assert comparison.delta_p("CAGrad") == comparison.delta_p("CAGrad", task="a") == "diverged"
    assert comparison.delta_p("PCGrad") == "not run"
    assert comparison.difference("MGDA", "STL") == "MGDA not trained: a"
    assert comparison.worst_task("MGDA") is None
    assert "MGDA" not in comparison.mean_ranks()
    assert Comparison(EW).delta_p("EW") == "STL not run"
    assert Comparison([]).scale == "not run" and Comparison([]).tasks == []
    assert Comparison([]).delta_p("EW") == "not run"


def test_a_baseline_at_its_floor_takes_every_delta_p_away():
    comparison = Comparison([*runs("STL", [(9.5, 50.0)]), *EW[:1]])
    assert comparison.delta_p("EW") == "STL not trained: a"
    assert comparison.delta_p("EW", task="a") == "at its floor"
    assert comparison.delta_p("EW", task="b").mean == 0.0


def test_a_run_that_is_pending_is_not_run():
    pending = {"config": EW[0]["config"], "state": "pending"}
    comparison = Comparison([*STL, pending])
    assert comparison.delta_p("EW") == "not run" and comparison.scale == "cpu"


def test_an_epoch_chosen_on_test_is_no_number():
    """Records of benchmarks without a validation split: the average of the last ten alone."""
    chosen = [record(run, 0, None, (1.0, 50.0)) for run in ("STL", "EW")]
    for run in chosen:
        run["selected"]["best test epoch"] = {
            "epoch": 1,
            "test": {"a": {"MAE": 0.1}, "b": {"Acc": 99.0}},
        }
    comparison = Comparison(chosen)
    assert comparison.protocols == ["last ten"] and comparison.protocol == "last ten"
    assert comparison.delta_p("EW").mean == 0.0
    assert comparison.delta_p("EW", "best") == "no validation split"
    verdict = comparison.verdict(minus("EW", "STL"), 1.0)
    assert verdict.word == "one run"
    assert verdict.cells()["ours, best epoch"] == "no validation split"


def test_a_difference_by_both_rules_with_the_word_that_changes():
    close = [(0.9, 50.0), (1.9, 40.0), (1.1, 50.0)]
    better = [(0.5, 50.0), (1.0, 40.0), (0.51, 50.0)]
    comparison = Comparison([*STL, *runs("EW", close), *runs("DB-MTL", close, better)])
    verdict = comparison.verdict(minus("DB-MTL", "EW"), printed=25.0)
    assert verdict.intervals["best"] == Interval(0.0, 0.0, 0.0, 3)
    assert verdict.words["best"] == "undecided, another size"
    assert verdict.intervals["last ten"].sign == 1
    assert not verdict.agrees
    assert verdict.word == "undecided, another size (best epoch); same sign (last ten epochs)"


def test_a_verdict_where_both_rules_agree_is_one_word():
    better = runs("DB-MTL", [(0.5, 50.0), (1.0, 40.0), (0.51, 50.0)])
    comparison = Comparison([*STL, *EW, *better])
    verdict = comparison.verdict(minus("DB-MTL", "EW"), printed=-1.0)
    assert verdict.agrees and verdict.word == "opposite sign"
    assert comparison.verdict(minus("DB-MTL", "PCGrad"), printed=1.0).word == "not run"
    assert Comparison([*STL[:1], *EW[:1]]).verdict(minus("EW", "STL"), 1.0).word == "one run"


def test_a_contrast_is_taken_seed_by_seed():
    half = runs("loss-only", [(0.95, 50.0), (1.9, 41.0), (0.9, 50.0)])
    comparison = Comparison([*STL, *EW, *half])
    by_seed = [seeds(comparison, name) for name in ("EW", "loss-only")]
    expected = [2 * by_seed[0][seed] - 0.5 * by_seed[1][seed] for seed in range(3)]
    assert comparison.contrast({"EW": 2, "loss-only": -0.5}) == pytest.approx(interval(expected))
    assert comparison.sample({"EW": 1, "PCGrad": 1}).empty
    assert comparison.contrast({"EW": 1, "PCGrad": 1, "MGDA": 1}) == "PCGrad not run; MGDA not run"


def test_differences_against_scipy_and_holm():
    better = [(0.5, 50.0), (1.0, 41.0), (0.51, 52.0)]
    worse = [(1.0, 40.0), (2.0, 35.0), (1.2, 45.0)]
    comparison = Comparison([*STL, *EW, *runs("DB-MTL", better), *runs("CAGrad", worse)])
    pairs = [("DB-MTL", "EW"), ("CAGrad", "EW"), ("DB-MTL", "CAGrad"), ("PCGrad", "EW")]
    table = comparison.differences(pairs)
    for row, (first, second) in enumerate(pairs[:3]):
        ours = seeds(comparison, first)
        sample = [ours[seed] - seeds(comparison, second)[seed] for seed in range(3)]
        p = stats.ttest_1samp(sample, 0).pvalue
        assert table["p (best)"][row] == pytest.approx(p)
        assert (table["best"][row].sign != 0) == (p < 0.05)
    assert math.isnan(table["p (best)"][3]) and table["best"][3] is None
    assert not table["told apart"][3]
    for protocol in ("best", "last ten"):
        expected = holm(table[f"p ({protocol})"])
        assert table[f"p ({protocol}, Holm)"].tolist()[:3] == pytest.approx(expected[:3])
    assert (table["told apart"][:3] == (table["p (best, Holm)"][:3] < 0.05)).all()
    assert table["told apart"].any()


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


def test_the_worst_task_and_ranks_by_hand():
    other = runs("GLS", [(0.5, 30.0), (1.0, 24.0), (0.4, 30.0)])
    comparison = Comparison([*STL, *EW, *other])
    assert comparison.worst_task("EW") == ("b", pytest.approx(0.0))
    assert comparison.worst_task("GLS") == ("b", pytest.approx(-40.0))
    assert comparison.mean_ranks().to_dict() == {"EW": 1.5, "GLS": 1.5}
    table = comparison.metrics()
    assert table.loc["EW", ("a", "MAE")].mean == pytest.approx(3.5 / 3)
    assert list(table.columns) == [("a", "MAE"), ("b", "Acc")]
    assert worst_in_words(("depth", -3.25), places=0) == "depth (-3 %)"
    assert worst_in_words(None) is None


def test_common_tasks_are_those_that_all_runs_trained():
    poor = runs("MGDA", [(9.0, 60.0), (1.0, 44.0), (1.0, 50.0)])
    comparison = Comparison([*STL, *EW, *poor])
    tasks, means = comparison.common(["EW", "MGDA"])
    assert tasks == ["b"] and means["MGDA"].tolist() == pytest.approx([20.0, 10.0, 0.0])
    assert comparison.common(["EW"])[0] == ["a", "b"]


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
        ("paper", Interval(0.5, -1.0, 2.0, 3), 0.4, "undecided"),
        ("cpu", Interval(0.5, -math.inf, math.inf, 1), 0.4, "one run"),
        ("cpu", Interval(0.5, 0.2, 0.8, 2), 8.0, "undecided"),
        ("smoke", Interval(0.5, 0.2, 0.8, 3), 8.0, "none"),
        ("cpu", None, 8.0, "not run"),
    ],
)
def test_words(scale, measured, printed, word):
    assert judged(scale, measured, printed) == word


def test_reproduced_is_for_the_papers_own_benchmark():
    clear = Interval(0.5, 0.2, 0.8, 3)
    assert judged("paper", clear, 0.4, own_benchmark=False) == "same sign"
    with pytest.raises(ValueError, match="printed must not be 0"):
        judged("cpu", None, 0.0)


def test_estimates_and_p_values():
    assert estimate([]) is None and estimate(None) is None
    assert estimate({0: 2.0}).count == 1 and not math.isfinite(estimate([2.0]).half_width)
    assert estimate([1.0, 2.0, 6.0]) == interval([1.0, 2.0, 6.0])
    assert math.isnan(p_value([1.0]))
    assert (p_value([0.0, 0.0]), p_value([2.0, 2.0])) == (1.0, 0.0)
    assert p_value([1.0, 2.0, 6.0]) == pytest.approx(stats.ttest_1samp([1.0, 2.0, 6.0], 0).pvalue)

"""From run records to tables: grouping, floors, differences by seed, verdicts, stable files."""

import csv
import math

import pytest
from helpers.records import small_record
from scipy.stats import t as student

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.intervals import Interval
from dbmtl.experiments.records import (
    configuration,
    run_identity,
    write_record,
)
from dbmtl.report import comparison
from dbmtl.report.comparison import (
    compared,
    contrast,
    current_records,
    delta_p_by_seed,
    describe_runs,
    difference,
    estimate,
    gains_of_task,
    group_records,
    html_table,
    lost_runs,
    markdown_table,
    mean_ranks,
    number,
    ratio_of_logs,
    records_to_draw,
    span,
    task_gains_by_seed,
    untrained,
    verdict,
    why_missing,
    why_no_contrast,
    worst_in_words,
    worst_tasks,
    write_table,
)
from dbmtl.report.plots import curve_rows, panel_grid, seed_bars, series


def record(method, seed, a=1.0, b=50.0, state="finished", scale="cpu", **changes):
    """A small record: task a's floor is 2 (lower is better), task b's is 10 (higher is better)."""
    test = {"a": {"MAE": a}, "b": {"Acc": b}}
    selected = {"best validation epoch": {"epoch": 1, "test": test}}
    curves = {"epochs": [1, 2], "train": {"a": [float(seed), 2.0]}}
    changes = {"curves": curves} | changes
    return small_record(method, seed, selected, (2.0, 10.0), state, scale, **changes)


def groups(*records):
    return group_records([*(record("STL", seed, 1.0, 50.0) for seed in range(3)), *records])


def test_report_delta_p_by_hand():
    found = groups(record("EW", 0, a=1.5, b=60.0), record("EW", 1, a=1.0, b=50.0))
    assert task_gains_by_seed(found)["EW"][0] == pytest.approx({"a": -50.0, "b": 20.0})
    assert delta_p_by_seed(found)["EW"] == pytest.approx({0: (-50 + 20) / 2, 1: 0.0})
    assert worst_tasks(found)["EW"] == ("a", pytest.approx(-25.0))


def test_report_every_run_is_compared_with_the_baselines_run_of_its_seed():
    found = group_records(
        [record("STL", 0, a=0.5), record("STL", 1, a=1.5), record("EW", 0, a=0.9)]
    )
    assert task_gains_by_seed(found)["EW"][0]["a"] == pytest.approx(-80.0)
    assert delta_p_by_seed(found)["STL"] == {0: 0.0, 1: 0.0}
    without = group_records([record("STL", 0), record("EW", 0), record("EW", 1)])
    assert list(delta_p_by_seed(without)["EW"]) == [0]  # seed 1 has no baseline
    assert "EW" not in delta_p_by_seed(group_records([record("STL", 0), record("EW", 1)]))


def test_report_a_task_at_its_floor_takes_delta_p_and_verdict_away():
    found = groups(record("EW", 0, a=1.95), record("EW", 1, a=1.0))
    assert untrained(found) == {"EW": ["a"]}
    assert "EW" not in delta_p_by_seed(found) and "STL" in delta_p_by_seed(found)
    assert list(task_gains_by_seed(found)["EW"][1]) == ["b"]
    assert why_missing(found, "EW") == "not trained: a"
    row = compared(found, delta_p_by_seed(found), {"EW": 1}, -5.0)
    assert row["ours"] == "not trained: a" and row["verdict"] == "none"


def test_report_a_baseline_at_its_floor_takes_every_delta_p_away():
    found = group_records([record("STL", 0, a=2.5), record("EW", 0)])
    assert delta_p_by_seed(found) == {} and why_missing(found, "EW") == "STL not trained: a"
    assert list(task_gains_by_seed(found)["EW"][0]) == ["b"]


def test_report_lost_runs_are_listed():
    found = groups(record("EW", 0), record("EW", 1, state="diverged"))
    assert lost_runs(found) == ["EW seed 1 diverged at step 5 of 30 (the loss of a is not finite)"]
    assert list(delta_p_by_seed(found)["EW"]) == [0]
    assert why_missing(groups(record("EW", 1, state="diverged")), "EW") == "diverged"
    assert why_missing(groups(), "EW") == "not run"


@pytest.mark.parametrize("change", [{"epochs": 4}, {"width": 9}, {"name": "gpu"}])
def test_report_runs_of_different_sizes_are_not_mixed(change):
    other = record("EW", 0)
    other["config"]["scale"] |= change
    with pytest.raises(ValueError, match="'EW', seed 0, is not comparable: its scale differ"):
        groups(other)


def test_report_runs_of_other_hyperparameters_or_data_are_not_mixed():
    other = record("EW", 1)
    other["config"]["hyper"] = {"c": 1}
    assert list(groups(record("EW", 0), other)) == ["STL", "EW", "EW(c=1)"]
    with pytest.raises(ValueError, match="hyper differ"):
        group_records([record("EW", 0), other], key=lambda record: record["config"]["method"])
    with pytest.raises(ValueError, match="data differ"):
        groups(record("EW", 0, data={"hash": "y", "note": ""}))
    with pytest.raises(ValueError, match="two records of 'EW', seed 0"):
        groups(record("EW", 0), record("EW", 0))


def test_report_mean_rank_over_metrics():
    found = groups(
        record("EW", 0, a=1.0, b=40.0),
        record("DB-MTL", 0, a=0.5, b=60.0),
        record("GLS", 0, a=0.8, b=30.0),
    )
    assert mean_ranks(found) == pytest.approx(
        {"EW": (3 + 2) / 2, "DB-MTL": 1.0, "GLS": (2 + 3) / 2}
    )


def test_report_differences_are_paired_by_seed():
    values = {"x": {0: 1.0, 1: 3.0, 2: 5.0}, "y": {1: 1.0, 2: 2.5, 0: 0.5}}
    found, steps = difference(values, "x", "y"), [0.5, 2.0, 2.5]
    spread = math.sqrt(sum((s - sum(steps) / 3) ** 2 for s in steps) / 2)
    assert found.mean == pytest.approx(sum(steps) / 3)
    assert found.half_width == pytest.approx(
        student.ppf(0.975, 2) * spread / math.sqrt(3), rel=1e-6
    )
    assert contrast(values, {"x": 1, "z": 1}) is None
    assert contrast(values | {"z": {2: 0.0}}, {"x": 1, "z": -1}).count == 1
    assert (
        estimate([]) is None
        and estimate([2.0]).count == 1
        and not math.isfinite(estimate([2.0]).half_width)
    )


CLEAR = Interval(2.0, 1.0, 3.0, 3)
UNCLEAR = Interval(2.0, -1.0, 5.0, 3)


@pytest.mark.parametrize(
    "scale, found, sign, own, word",
    [
        ("paper", CLEAR, 1, True, "reproduced"),
        ("paper", CLEAR, -1, True, "not reproduced"),
        ("paper", CLEAR, 1, False, "same sign"),
        ("paper", UNCLEAR, 1, True, "undecided"),
        ("cpu", CLEAR, 1, True, "same sign"),
        ("gpu", CLEAR, -1, True, "opposite sign"),
        ("cpu", UNCLEAR, 1, True, "undecided"),
        ("cpu", Interval(2.0, 1.0, 3.0, 2), 1, True, "undecided"),
        ("paper", Interval(2.0, -math.inf, math.inf, 1), 1, True, "one run"),
        ("smoke", CLEAR, 1, True, "none"),
        ("paper", None, 1, True, "not run"),
    ],
)
def test_report_verdict_words(scale, found, sign, own, word):
    assert verdict(scale, found, sign, own) == word


def test_report_compared_judges_against_the_sign_of_the_paper():
    found = groups(*(record("EW", seed, a=1.5 + 0.01 * seed) for seed in range(3)))
    values = delta_p_by_seed(found)
    words = [compared(found, values, {"EW": 1}, paper)["verdict"] for paper in (-3.0, 3.0)]
    assert words == ["same sign", "opposite sign"]
    assert compared(found, values, {"EW": 1}, -3.0)["ours"].mean == pytest.approx(-25.5)


def stored(folder, method, seed=0, scale="cpu", sizes=None, hyper=None):
    """A record on disk whose configuration is the toy's present one, or of other `sizes`."""
    made = record(method, seed)
    made["config"] = configuration("toy", method, seed, "cpu", hyper)
    made["config"]["scale"] |= {"name": scale} | (sizes or {})
    made["identity"] = run_identity(made["config"], "x")
    write_record(made, folder)
    return made


def test_report_draws_the_best_scale_that_can_be_compared(tmp_path):
    made = [record("STL", 0, scale="smoke"), record("EW", 0, scale="smoke")]
    assert records_to_draw("toy", made, folder=tmp_path) == ("smoke", made)
    stored(tmp_path, "STL")
    assert records_to_draw("toy", made, folder=tmp_path) == ("smoke", made), (
        "a baseline alone is no table"
    )
    stored(tmp_path, "EW")
    assert records_to_draw("toy", made, folder=tmp_path) == ("smoke", made), (
        "nor is one method beside it"
    )
    stored(tmp_path, "loss-only")
    stored(tmp_path, "DB-MTL", hyper={"beta": 0.1})
    stored(tmp_path, "DB-MTL", sizes={"epochs": 41})
    scale, records = records_to_draw("toy", made, folder=tmp_path)
    assert scale == "cpu" and [r["config"]["method"] for r in records] == ["EW", "STL", "loss-only"]


def test_report_draws_paper_scale_before_cpu(tmp_path):
    from dataclasses import replace

    toy = get_benchmark("toy")
    both = replace(toy, scales=toy.scales | {"paper": toy.scales["cpu"]})
    for scale in ("cpu", "paper"):
        for method in ("STL", "EW", "loss-only"):
            stored(tmp_path, method, scale=scale)
    assert records_to_draw(both, [], folder=tmp_path)[0] == "paper"


def test_report_current_records_are_configured_as_today(tmp_path):
    made = [stored(tmp_path, "EW"), stored(tmp_path, "EW", sizes={"epochs": 41})]
    made += [stored(tmp_path, "DB-MTL", hyper={"beta": 0.1}), stored(tmp_path, "EW", scale="gpu")]
    assert current_records(made, "toy", "cpu") == made[:1]
    assert current_records(made, "toy", "cpu", {"EW", "DB-MTL(beta=0.1)"}) == [made[0], made[2]]
    assert current_records(made, "toy", "cpu", {"UW"}) == []
    assert current_records(made, "qm9", "cpu") == []
    assert records_to_draw("toy", [], folder=tmp_path) == ("not run", [])


def test_report_gains_of_a_task_leave_out_runs_that_did_not_train_it():
    gains = {"EW": {0: {"a": 1.0}, 1: {"b": 2.0}}, "UW": {0: {"b": 3.0}}}
    assert gains_of_task(gains, "b") == {"EW": {1: 2.0}, "UW": {0: 3.0}}


def test_report_ratios_come_from_logarithms():
    ratio, low, high = ratio_of_logs(Interval(math.log(2), 0.0, math.log(4), 3))
    assert (ratio, low, high) == pytest.approx((2, 1, 4))
    assert ratio_of_logs(estimate([0.0])) == (1.0, None, None)


def test_report_words_for_cells():
    assert (span([2, 2]), span({1, 3}), span([5])) == ("2", "1 to 3", "5")
    assert worst_in_words(("depth", -3.25)) == "depth (-3.2 %)"
    assert worst_in_words(("depth", -3.25), places=0) == "depth (-3 %)"
    assert worst_in_words(None) is None
    assert why_no_contrast(groups(), {"EW": 1, "STL": -1}) == "EW not run"
    assert why_no_contrast(groups(), {"STL": 1}) == "no common seed"


def test_report_marks_records_of_older_code(monkeypatch):
    """Those whose replay differs; a record that was never replayed is not marked."""
    replayed = {"EW": True, "DB-MTL": False, "CAGrad": None}
    monkeypatch.setattr(comparison, "is_current", lambda record: replayed[method_of(record)])
    assert "older code" not in describe_runs([record("EW", 0), record("CAGrad", 0)])
    assert "older code: DB-MTL" in describe_runs([record("EW", 0), record("DB-MTL", 0)])


def method_of(run):
    return run["config"]["method"]


def test_report_describes_size_device_and_seeds():
    text = describe_runs([record("EW", 0), record("EW", 1), record("DB-MTL", 0)])
    parts = [
        "toy at cpu scale",
        "3 epochs of batch 4",
        "30 steps",
        "width 8",
        "generated",
        "cpu: test",
        "1 to 2 seeds",
    ]
    assert [part for part in parts if part not in text] == []
    with pytest.raises(ValueError, match="records is empty"):
        describe_runs([])


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (Interval(-1.234, -1.334, -1.134, 3), "-1.23 ± 0.10"),
        (Interval(5.0, -math.inf, math.inf, 1), "5 (one run)"),
        (12345.6, "12346"),
        (-0.00001, "-1e-05"),
        (-0.0, "0"),
        (1.8e-15, "0"),
        (-1.8e-15, "0"),
        (Interval(2.5, 2.5 - 1e-16, 2.5 + 4e-16, 3), "2.5000 ± 0.0000"),
        ("word", "word"),
    ],
)
def test_report_numbers_as_people_read_them(value, text):
    assert number(value) == text


def test_report_tables_are_escaped_and_stable(tmp_path):
    rows = [{"method": "a|b", "x": Interval(1.0, 0.5, 1.5, 3)}, {"method": "<c>", "y": 2.0}]
    assert "a\\|b" in markdown_table(rows) and "&lt;c&gt;" in html_table(rows)
    first = [path.read_bytes() for path in write_table("t", rows, tmp_path, "Caption.")]
    assert first == [path.read_bytes() for path in write_table("t", rows, tmp_path, "Caption.")]
    with open(tmp_path / "t.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["x low"] == "0.5" and lines[0]["x seeds"] == "3" and float(lines[1]["y"]) == 2


def test_report_curves_keep_the_points_that_all_seeds_have():
    short = record("EW", 1, curves={"epochs": [2], "train": {"a": [7.0]}})
    x, y = series({0: record("EW", 0), 1: short}, "train", "a")
    assert x.tolist() == [2] and y.tolist() == [[2.0], [7.0]]
    assert len(series({0: record("EW", 0)}, "norms", "a")[0]) == 0
    lost = record("EW", 2, state="diverged")
    assert series({0: record("EW", 0), 2: lost}, "train", "a")[1].shape == (1, 2)
    rows = curve_rows({"EW": {0: record("EW", 0)}}, "train", ["a"], ["EW", "DB-MTL"])
    assert rows == [
        {"task": "a", "method": "EW", "seed": 0, "epoch": 1, "train": 0.0},
        {"task": "a", "method": "EW", "seed": 0, "epoch": 2, "train": 2.0},
    ]


def test_report_bars_mark_what_is_missing():
    from matplotlib.figure import Figure

    axes = panel_grid(Figure(), ["a"])
    ax = seed_bars(axes["a"], {"EW": {0: -1.0, 1: -3.0}}, ["EW", "DB-MTL"], {"DB-MTL": "not run"})
    assert [bar.get_height() for bar in ax.patches] == [-2.0]
    assert [text.get_text() for text in ax.texts] == ["not run"]


def test_report_compares_notes_over_all_seeds_and_hashes_within_one():
    def made(method, seed, digest, note):
        return record(method, seed) | {"data": {"hash": digest, "note": note}}

    group_records(
        [
            made("EW", 0, "a", "generated"),
            made("EW", 1, "b", "generated"),
            made("STL", 1, "b", "generated"),
        ]
    )
    with pytest.raises(ValueError, match="its data differ"):
        group_records(
            [made("EW", 0, "a", "generated"), made("EW", 1, "b", "sample of 7,000 molecules")]
        )
    pending = {"config": record("EW", 0)["config"], "state": "pending"}
    with pytest.raises(ValueError, match="its data differ"):
        group_records(
            [pending, made("STL", 0, "a", "generated"), made("DB-MTL", 0, "b", "generated")]
        )

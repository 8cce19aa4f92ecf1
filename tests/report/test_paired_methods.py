"""Pairs of methods: levels, the noise floor, verdicts with Holm's correction, monitored steps."""

import matplotlib

matplotlib.use("Agg")
import math

import matplotlib.pyplot as plt
import pandas as pd
import pytest
from helpers.made_up import FLOOR, page

from dbmtl.report.paired_methods import (
    Levels,
    Study,
    balanced_ratios,
    beyond,
    change_rows,
    counted,
    drift_rows,
    length_ratios,
    level_rows,
    levels_of,
    log_change,
    monitor_figure,
    monitor_frame,
    movement_rows,
    pair_in_words,
    pair_rows,
    pairs_figure,
    pairs_frame,
    printed_pair,
    task_rows,
    verdict_rows,
    verdict_table,
)
from dbmtl.report.results_page import open_page
from dbmtl.report.several_benchmarks import artifacts_of

PAIRS = {name: (name, f"{name}+log") for name in ("CAGrad", "Nash-MTL")}
LABELS = ["CAGrad", "CAGrad+log", "Nash-MTL", "Nash-MTL+log", "DB-MTL"]
TITLES = {"office31": "Office-31", "nyuv2": "NYUv2"}
GAINS = {
    "CAGrad": [1, 2, 3],
    "CAGrad+log": [3, 4.1, 4.9],
    "Nash-MTL": [2, 2, 2],
    "Nash-MTL+log": [2.4, 1.5, 2],
    "DB-MTL": [4, 5, 5],
}
PRINTED = {"CAGrad": -0.3, "CAGrad+log": 0.3, "Nash-MTL": -1.0, "Nash-MTL+log": -0.7, "DB-MTL": 1.1}


@pytest.fixture
def pages():
    yield {
        "office31": page("office31", GAINS),
        "nyuv2": open_page("15_paper/07_figure1_log", "nyuv2", methods=["none of the records"]),
    }
    plt.close("all")


def test_pairs_levels_are_delta_p_where_every_method_has_one(pages):
    levels = levels_of(pages["office31"], LABELS)
    assert levels.is_delta_p and levels.mean("CAGrad", "best") == pytest.approx(2)
    assert list(levels.difference("CAGrad+log", "CAGrad", "best")) == pytest.approx([2, 2.1, 1.9])
    assert levels.noise_floor() == pytest.approx(0.5)
    assert levels_of(pages["nyuv2"], LABELS).tables["best"].empty


def test_pairs_levels_are_over_common_tasks_where_one_is_at_its_floor():
    gains = GAINS | {"CAGrad": [FLOOR, 2, 3]}
    levels = levels_of(page("office31", gains, at_floor=["dslr"]), LABELS)
    assert not levels.is_delta_p and levels.tasks["best"] == ["amazon", "webcam"]
    assert levels.mean("DB-MTL", "best") == pytest.approx(14 / 3)
    assert "2 common tasks" in levels.in_words()


def test_pairs_rows_hold_every_seed_and_what_is_printed(pages):
    rows = level_rows(pages, LABELS, {"nyuv2": PRINTED})
    assert len(rows) == 5 * 3 * 2 + 5
    assert {row["what"] for row in rows} == {"delta_p"}
    paper = {row["method"]: row["percent"] for row in rows if row["series"] == "paper"}
    assert paper == PRINTED
    frame = pairs_frame(levels_of(pages["office31"], LABELS), PAIRS)
    assert len(frame) == 2 * 2 * 3 and set(frame["row"]) == set(PAIRS)


def test_pairs_figure_has_no_empty_panel(pages):
    left, right = pairs_figure(pages, TITLES, PAIRS, PRINTED).axes
    assert left.get_title(loc="left") == "Office-31 (cpu)"
    assert right.get_title(loc="right") == "grey: noise floor, ±0.5"
    nothing = {"nyuv2": pages["nyuv2"]}
    assert len(pairs_figure(nothing, TITLES, PAIRS, PRINTED).axes) == 2  # the paper's alone


def test_pairs_verdicts_are_counted_with_holm(pages):
    asked = {f"C13: {log}": (log, base) for base, log in PAIRS.values()}
    in_print = {"C13: CAGrad+log": 0.6, "C13: Nash-MTL+log": 0.3}
    comparison = pages["office31"].comparison
    rows = verdict_rows(comparison, asked, in_print, own_benchmark=False)
    assert [row["in short"] for row in rows] == ["same sign", "undecided"]
    assert [row["told apart"] for row in rows] == ["yes", "no"]
    raw = comparison.differences([asked["C13: CAGrad+log"]])["p (best)"][0]
    assert rows[0]["largest p (Holm)"] == pytest.approx(2 * raw)
    assert counted(rows) == ("1 same sign, 1 undecided; 1 of 2 told apart with Holm's correction")
    assert beyond(rows, 0.5) == 1 and beyond(rows, 5) == 0
    table = verdict_table(pages, TITLES, asked, PRINTED, "nyuv2")
    assert [row["benchmark"] for row in table] == ["on Office-31", "on Office-31", "NYUv2"]
    assert table[-1]["verdict"] == "not run"


@pytest.mark.full
def test_pairs_study_leaves_pictures_and_tables(pages, tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    monkeypatch.setattr(plt, "show", lambda: None)
    study = Study(
        pages,
        TITLES,
        PAIRS,
        PRINTED,
        own="nyuv2",
    )
    study.show("figure1", "Figure 1.")
    study.show_changes("figure1_by_task", "Figure 1 by task.")
    study.show_verdicts("figure1_numbers", "Figure 1.", {"C13": {"CAGrad": PAIRS["CAGrad"][::-1]}})
    folder = artifacts_of(study.pages).folder
    drawn = pd.read_csv(folder / "figure1.csv")
    assert len(drawn) == 5 * 3 * 2 + 5 and (folder / "figure1_by_task.png").exists()
    assert "same sign" in (folder / "figure1_numbers.md").read_text()


def test_pairs_changes_by_task(pages):
    rows = change_rows(pages, PAIRS)
    assert len(rows) == 2 * 3 and rows[0]["points"] == pytest.approx(2)
    by_task = task_rows(pages, TITLES, "CAGrad+log", "CAGrad")
    assert [row["task"] for row in by_task] == ["amazon", "dslr", "webcam"]
    assert by_task[0]["ours, best epoch"].mean == pytest.approx(2)


def test_pairs_of_several_benchmarks_share_one_correction(pages):
    rows = pair_rows(pages, TITLES, "CAGrad+log", "CAGrad", {"office31": 0.6, "nyuv2": 0.6})
    assert rows[0]["verdict"] == "same sign, another size" and rows[1]["verdict"] == "not run"
    assert rows[0]["largest p (Holm)"] < 0.05 and rows[1]["largest p (Holm)"] is None
    words = pair_in_words(rows, "C13")
    assert words.startswith("C13. Office-31: 2.00") and words.endswith("NYUv2: not run.")


def test_pairs_printed_differences_are_those_of_the_tables():
    second_figure = printed_pair(2, "loss-only", "IMTL-L")
    assert second_figure["office31"].mean == pytest.approx(0.93 + 0.63)
    assert printed_pair(3, "gradient-only", "GradNorm")["qm9"].mean == pytest.approx(161.77)
    with pytest.raises(KeyError):
        printed_pair(2, "loss-only", "no method")


def test_pairs_monitored_steps_multiply(pages):
    frame = monitor_frame(pages, ["CAGrad", "DB-MTL"])
    assert len(frame) == 2 * 3 * 3 * 2  # methods, seeds, tasks, steps
    assert list(frame["slope x loss"][:2]) == pytest.approx([1.0, 4.0])  # 1 x 1 and 2 x 2
    ratios = length_ratios(frame)
    assert list(ratios["longest / shortest"][:2]) == pytest.approx([27, 8])  # 3³/1³, 4³/2³
    (moved,) = movement_rows(pages, TITLES, frame, "CAGrad", "weights")
    assert moved["largest |log|"] == pytest.approx(math.log(4))
    fig = monitor_figure(ratios, "longest / shortest", TITLES, ["CAGrad", "DB-MTL"])
    assert len(fig.axes) == 1
    empty = monitor_frame({"nyuv2": pages["nyuv2"]}, ["CAGrad"])
    assert empty.empty and length_ratios(empty).empty
    with pytest.raises(ValueError, match="nothing to draw"):
        monitor_figure(empty, "losses", TITLES, ["CAGrad"])


def test_pairs_drift_of_the_twins(pages):
    (row,) = drift_rows(pages, TITLES, LABELS)
    assert row["losses apart, first epoch"] == 0 and row["noise floor, points"] > 0
    assert drift_rows({"nyuv2": pages["nyuv2"]}, TITLES, LABELS) == []


def test_pairs_without_numbers_have_no_floor():
    assert math.isnan(Levels(True, {}, {}).noise_floor())


def test_nash_mtl_is_one_method_with_and_without_the_logarithm():
    assert log_change("Nash-MTL") < 1e-6
    assert min(log_change(name) for name in ("PCGrad", "IMTL-G", "CAGrad")) > 0.1


def test_max_norm_lengths_are_equal_and_gradnorms_are_not():
    assert max(balanced_ratios("toy", "gradient-only")) < 1 + 1e-5
    assert max(balanced_ratios("toy", "GradNorm", window=2, longest=10)) > 1.001

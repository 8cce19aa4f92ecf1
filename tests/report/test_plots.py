"""Panels and what a notebook leaves: notes, logarithmic axes, ratios, legends, files with cards."""

import json

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest

from dbmtl.report.plots import (
    Artifacts,
    name_benchmark,
    panel_note,
    ratio_mark,
    ratio_panel,
    shared_legend,
    tidy_log,
    upright_note,
)


@pytest.fixture
def ax():
    yield plt.subplots()[1]
    plt.close("all")


@pytest.mark.parametrize(
    "limits, ticks",
    [
        ((1.2, 5.0), [1.5, 2, 3, 4]),
        ((1.2, 30.0), [2, 5, 10, 20]),
        ((0.5, 2000.0), [1, 10, 100, 1000]),
    ],
)
def test_plots_log_axis_has_a_few_plain_numbers(ax, limits, ticks):
    ax.plot([0, 1], limits)
    ax.set_ylim(limits)
    assert tidy_log(ax) is ax and ax.get_yscale() == "log"
    shown = [tick for tick in ax.get_yticks() if limits[0] <= tick <= limits[1]]
    assert shown == pytest.approx(ticks) and len(ax.get_yticks(minor=True)) == 0
    assert ax.yaxis.get_major_formatter()(1000.0, 0) == "1000"


def test_plots_notes_are_where_they_are_put(ax):
    assert panel_note(ax, "not run") is ax and upright_note(ax, "at floor", 2.0, 0.75) is ax
    note, upright = ax.texts
    assert note.get_position() == (0.5, 0.5) and note.get_transform() == ax.transAxes
    assert upright.xy == (2.0, 0.75) and upright.get_rotation() == 90
    assert panel_note(ax, "x", 0.1, 0.2, va="baseline").texts[-1].get_va() == "baseline"


def test_plots_ratio_panel_puts_benchmarks_apart(ax):
    rows = [
        {"benchmark": "on a", "scale": "cpu", "task": "x"},
        {"benchmark": "on a", "scale": "cpu", "task": "geometric mean"},
        {"benchmark": "b", "scale": "generated", "task": "y"},
    ]
    calls = []

    def draw_row(ax, row, place, is_first):
        calls.append((row["task"], place, is_first))
        if is_first:
            name_benchmark(ax, row, place)

    assert ratio_panel(ax, rows, draw_row, "ratio") is ax
    assert calls == [("x", 0, True), ("geometric mean", 1, False), ("y", 3, True)]
    assert list(ax.get_xticks()) == [0.5, 1.5, 3.5] and ax.get_xlim() == (0, 4)
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["x", "mean", "y"]
    assert [text.get_text() for text in ax.texts] == ["a", "streets"]


def test_plots_ratio_mark_has_an_interval_where_there_is_one(ax):
    ratio_mark(ax, 1.0, 2.0, None, None, marker="o")
    assert len(ax.lines) == 1
    ratio_mark(ax, 1.0, 2.0, 0.5, 8.0, marker="o")
    assert [list(line.get_ydata()) for line in ax.lines] == [[2.0], [0.5, 8.0], [2.0]]


def test_plots_shared_legend_names_each_label_once():
    fig, axes = plt.subplots(1, 2)
    shared_legend(fig, columns=2)
    assert fig.legends == []
    for ax in axes:
        ax.plot([0, 1], label="EW")
    axes[1].plot([1, 0], label="DB-MTL")
    shared_legend(fig, columns=2)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["EW", "DB-MTL"]
    plt.close(fig)


def test_plots_artifacts_have_a_card_each(tmp_path):
    artifacts = Artifacts("15_paper/01_table1_nyuv2", tmp_path, {"nyuv2": []})
    made = artifacts.table("t", [{"a": 1}], "A table.")
    made += artifacts.figure("f", plt.figure(figsize=(1, 1)), "A figure.", [{"x": 1.0}])
    other = artifacts.of(runs={}, data="printed numbers", scale="")
    made.append(other.card("c", "A card."))
    assert sorted(path.relative_to(tmp_path).as_posix() for path in made) == [
        *("cards/c.json", "cards/f.json", "cards/t.json"),
        *("f.csv", "f.png", "f.svg", "t.csv", "t.html", "t.md"),
    ]
    table, computed = (json.loads((tmp_path / f"cards/{stem}.json").read_text()) for stem in "tc")
    assert table["runs"] == {"nyuv2": None} and table["caption"] == "A table."
    assert table["command"] == "ci/reproduce --only 15_paper/01_table1_nyuv2 --scale paper"
    assert computed["runs"] == {} and computed["data"] == "printed numbers"
    assert computed["command"] == "ci/reproduce --only 15_paper/01_table1_nyuv2"
    plt.close("all")

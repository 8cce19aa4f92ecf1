"""Rows of dots, factors, curves, legends: what is drawn is what the data say."""

import math

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

from dbmtl.experiments.intervals import Interval, interval
from dbmtl.report.plots import (
    SERIES,
    curve_frame,
    dots,
    dots_legend,
    draw_curves,
    factor_axis,
    legend_panel,
    panel_grid,
    shared_legend,
    tidy_log,
)
from dbmtl.report.style import palette_png, use_style


@pytest.fixture
def ax():
    use_style()
    yield plt.subplots()[1]
    plt.close("all")


def frame_of(values, series=None):
    """{row: seeds} as a frame."""
    rows = [{"row": row, "value": value} for row, seeds in values.items() for value in seeds]
    frame = pd.DataFrame(rows, columns=["row", "value"])
    return frame if series is None else frame.assign(series=series)


def marks(ax, marker):
    "(x, y) of all marks of a kind."
    lines = [line for line in ax.lines if line.get_marker() == marker]
    return [(float(line.get_xdata()[0]), float(line.get_ydata()[0])) for line in lines]


def bars(ax):
    "(low, high) of all intervals drawn, by height."
    drawn = {}
    for line in ax.lines:
        x, y = line.get_data()
        if len(x) == 2 and y[0] == y[1] and line.get_marker() in ("None", None, ""):
            drawn[float(y[0])] = (float(x[0]), float(x[1]))
    return drawn


def test_dots_are_means_with_students_interval(ax):
    values = {"EW": [1.0, 2.0, 4.5], "DB-MTL": [3.0, 3.5, 4.0]}
    dots(ax, frame_of(values), ["DB-MTL", "EW"])
    assert marks(ax, "o") == [(3.5, 0.0), (2.5, 1.0)]
    expected = interval(values["DB-MTL"])
    assert bars(ax)[0.0] == pytest.approx((expected.low, expected.high))
    seeds = [points.get_offsets()[:, 0].tolist() for points in ax.collections]
    assert seeds == [values["DB-MTL"], values["EW"]]
    assert ax.get_ylim() == (1.6, -0.6)  # from top to bottom


def test_the_papers_value_stands_in_the_same_row_with_the_same_kind_of_bar(ax):
    printed = {"EW": Interval(1.5, 1.0, 2.0, 3), "RLW": 0.5, "elsewhere": 9.0}
    frame = frame_of({"EW": [1.0, 1.1, 1.2]}, "best epoch")
    dots(ax, frame, ["EW", "RLW"], printed, {"RLW": "not run"})
    (ours,) = marks(ax, SERIES["best epoch"][1])
    paper = dict(marks(ax, SERIES["paper"][1]))
    assert set(paper) == {1.5, 0.5} and ours[1] < paper[1.5] < 0.5 < paper[0.5]
    assert bars(ax)[paper[1.5]] == (1.0, 2.0) and paper[0.5] not in bars(ax)
    assert [text.get_text() for text in ax.texts] == ["not run"]


def test_an_interval_that_leaves_the_picture_ends_in_an_arrow(ax):
    dots(ax, frame_of({"EW": [-1.0, 0.0, 1.0], "DB-MTL": [0.1, 0.2, 0.3]}), ["EW", "DB-MTL"])
    low, high = ax.get_xlim()
    student = interval([-1.0, 0.0, 1.0])
    assert student.low < low < -1.0 and 1.0 < high < student.high
    assert bars(ax)[0.0] == (low, high)
    assert marks(ax, "<") == [(low, 0.0)] and marks(ax, ">") == [(high, 0.0)]


def test_one_seed_has_no_interval_and_no_seed_no_dot(ax):
    dots(ax, frame_of({"EW": [1.0], "UW": [math.nan]}), ["EW", "UW", "GLS"])
    assert marks(ax, "o") == [(1.0, 0.0)] and bars(ax) == {}
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["EW", "UW", "GLS"]


def test_rows_keep_their_series_apart(ax):
    both = pd.concat(
        [
            frame_of({"EW": [1.0, 2.0]}, "last ten epochs"),
            frame_of({"EW": [3.0, 4.0]}, "best epoch"),
        ]
    )
    dots(ax, both, ["EW"], names={"EW": "equal weighting"})
    (best,) = marks(ax, "o")
    (last,) = marks(ax, "s")
    assert (best[0], last[0]) == (3.5, 1.5) and best[1] < last[1]
    assert ax.get_yticklabels()[0].get_text() == "equal weighting"


def test_the_legend_names_what_is_there():
    fig = plt.figure(figsize=(5, 1))
    legend = dots_legend(fig, ["best epoch", "paper"], texts={"paper": "paper (read off)"})
    assert [text.get_text() for text in legend.get_texts()] == [
        "ours, best epoch",
        "paper (read off)",
    ]
    plt.close(fig)


@pytest.mark.parametrize("low, high", [(0.4, 3.0), (0.97, 1.02), (0.05, 20.0), (1.0, 1.3)])
def test_factors_are_round_and_one_is_among_them(ax, low, high):
    ax.set_xlim(math.log(low), math.log(high))
    factor_axis(ax, most=4)
    places = ax.get_xticks()
    assert 1 <= len(places) <= 4 and 0.0 in places
    texts = [ax.xaxis.get_major_formatter()(place, 0) for place in places]
    assert [float(text) for text in texts] == pytest.approx(np.exp(places), rel=1e-2)


@pytest.mark.parametrize(
    "limits, ticks",
    [
        ((1.2, 5.0), [1.5, 2, 3, 4]),
        ((1.2, 30.0), [2, 5, 10, 20]),
        ((0.5, 2000.0), [1, 10, 100, 1000]),
    ],
)
def test_log_axis_has_a_few_plain_numbers(ax, limits, ticks):
    ax.plot([0, 1], limits)
    ax.set_ylim(limits)
    assert tidy_log(ax) is ax and ax.get_yscale() == "log"
    shown = [tick for tick in ax.get_yticks() if limits[0] <= tick <= limits[1]]
    assert shown == pytest.approx(ticks) and len(ax.get_yticks(minor=True)) == 0
    assert ax.yaxis.get_major_formatter()(1000.0, 0) == "1000"


def curves_of(method, seed, values, state="finished", **parts):
    config = {"method": method, "hyper": {}, "seed": seed}
    curves = {"epochs": list(range(1, len(values) + 1)), "train": {"a": values}}
    return {"config": config, "state": state, "curves": curves, "monitors": {}} | parts


def test_curves_are_a_row_a_point_of_finished_runs():
    norms = {"steps": [0, 5], "norms": {"a": [1.0, None]}}
    records = [
        curves_of("EW", 0, [2.0, 1.0], monitors=norms),
        curves_of("EW", 1, [3.0], "diverged"),
        curves_of("DB-MTL", 0, [1.0, 0.5]),
    ]
    frame = curve_frame(records, "train", ["a", "b"], ["DB-MTL", "EW"])
    assert frame.values.tolist() == [
        ["a", "DB-MTL", 0, 1, 1.0],
        ["a", "DB-MTL", 0, 2, 0.5],
        ["a", "EW", 0, 1, 2.0],
        ["a", "EW", 0, 2, 1.0],
    ]
    steps = curve_frame(records, "norms", ["a"])
    assert list(steps.columns) == ["task", "method", "seed", "step", "norms"] and len(steps) == 2
    assert curve_frame(records, "train", ["a"], ["UW"]).empty


def test_curves_are_the_mean_with_the_range_of_seeds(ax):
    records = [curves_of("EW", seed, [1.0 + seed, 2.0]) for seed in range(3)]
    frame = curve_frame(records, "train", ["a"])
    assert draw_curves(ax, frame, "a", ["EW", "DB-MTL"]) is ax
    (line,) = ax.lines
    assert line.get_ydata().tolist() == [2.0, 2.0] and line.get_label() == "EW"
    (band,) = ax.collections
    heights = band.get_paths()[0].vertices[:, 1]
    assert heights.min() == 1.0 and heights.max() == 3.0
    assert draw_curves(plt.subplots()[1], frame, "b", ["EW"]).lines[:] == []


def test_grids_and_legends(ax):
    fig = plt.figure()
    axes = panel_grid(fig, ["a", "b", "c"], columns=2)
    assert list(axes) == ["a", "b", "c", 0] and not axes[0].axison
    legend_panel(axes[0], ["EW", "loss-only"])
    texts = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert texts == ["EW", "loss only"]
    with pytest.raises(ValueError, match="names is empty"):
        panel_grid(fig, [])


def test_shared_legend_names_each_label_once():
    fig, axes = plt.subplots(1, 2)
    shared_legend(fig, columns=2)
    assert fig.legends == []
    for ax in axes:
        ax.plot([0, 1], label="EW")
    axes[1].plot([1, 0], label="DB-MTL")
    shared_legend(fig, columns=2)
    assert [text.get_text() for text in fig.legends[0].get_texts()] == ["EW", "DB-MTL"]
    plt.close(fig)


@pytest.mark.parametrize("noise", [2.2e-16, -3e-15])
def test_dots_are_the_same_bytes_with_rounding_errors(noise):
    def drawn(factor):
        use_style()
        fig, ax = plt.subplots()
        values = {"EW": [1.0 * factor, 2.0, 3.5], "DB-MTL": [0.1, 0.7 * factor, 0.3]}
        dots(ax, frame_of(values, "best epoch"), values, {"EW": 1.5 * factor})
        picture = palette_png(fig)
        plt.close(fig)
        return picture

    assert drawn(1.0) == drawn(1.0 + noise)

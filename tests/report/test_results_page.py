"""Pages of results: what is asked for, which records are shown, beside which printed numbers, and
the pictures."""

from dataclasses import replace

import matplotlib.pyplot as plt
import pytest

from dbmtl.benchmarks.base import Benchmark, Task, get_benchmark
from dbmtl.experiments.intervals import Interval
from dbmtl.experiments.records import configuration, run_identity, write_record
from dbmtl.registry import method_names
from dbmtl.report.paper import paper_summary, paper_table
from dbmtl.report.results_page import (
    ask,
    gain_rows,
    gains_figure,
    loss_rows,
    losses_figure,
    metric_columns,
    open_page,
    printed_gains,
    result_rows,
    table_caption,
)
from dbmtl.report.style import palette_png, use_style


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def record(
    benchmark,
    method,
    seed=0,
    scale="cpu",
    gain=0.0,
    state="finished",
    at_floor=(),
    gains=None,
    **changes,
):
    """Every metric of STL is 10; a gain of g percent moves it by g/10 to its better side."""
    benchmark, test, floors = get_benchmark(benchmark), {}, {}
    for task, metrics in benchmark.directions.items():
        percent = (gains or {}).get(task, gain)
        signs = {metric: 1 if better == "up" else -1 for metric, better in metrics.items()}
        floors[task] = {metric: 10 - 5 * sign for metric, sign in signs.items()}
        test[task] = {metric: 10 + sign * percent / 10 for metric, sign in signs.items()}
        if task in at_floor:
            test[task] = floors[task]
    config = configuration(benchmark, method, seed, scale)
    return {
        "identity": run_identity(config, "x"),
        "config": config,
        "state": state,
        "reason": "the loss of depth is not finite" if state == "diverged" else "",
        "step": 5,
        "steps": 30,
        "data": {"hash": "x", "note": "generated" if scale == "smoke" else "real"},
        "device": "cpu: test",
        "directions": benchmark.directions,
        "floors": {"test": floors, "validation": {}},
        "notes": [],
        "monitors": {},
        "selected": {"best test epoch": {"epoch": 1, "test": test}} if state == "finished" else {},
        "curves": {
            "epochs": [1, 2],
            "train": {task: [2.0, 1.0 + seed] for task in benchmark.directions},
        },
    } | changes


def page_of(benchmark, *runs, paper=None, stl=1, **options):
    """A page of these runs and of `stl` seeds of STL."""
    scale = runs[0]["config"]["scale"]["name"] if runs else "cpu"
    baseline = [record(benchmark, "STL", seed, scale) for seed in range(stl)]
    return open_page(benchmark, [*baseline, *runs], paper=paper, only_made=True, **options)


def rows_of(page, **wanted):
    return [row for row in result_rows(page) if row.items() >= wanted.items()]


# --------------------------------------------------------------------------------------------- runs


def test_pages_ask_for_what_is_written(tmp_path):
    made = ask("toy", " EW , DB-MTL", "3,1", "smoke", out=tmp_path)
    assert [(run["config"]["method"], run["config"]["seed"]) for run in made] == [
        ("EW", 3),
        ("DB-MTL", 3),
        ("EW", 1),
        ("DB-MTL", 1),
    ]
    again = ask("toy", "EW,DB-MTL", "3,1", "smoke", out=tmp_path)
    assert {run["status"] for run in again} == {"already there"} and {
        run["steps_now"] for run in again
    } == {0}
    assert [run["config"]["seed"] for run in ask("toy", "EW", "", "smoke", out=tmp_path)] == [0]
    assert len(ask("toy", "EW,EW", "0,0", "smoke", out=tmp_path)) == 1


def test_pages_ask_for_three_seeds_above_smoke(monkeypatch):
    asked = []

    def runs(benchmark, methods, seeds, scale, budget, **options):
        asked.append((benchmark, methods, seeds, scale, budget, options))
        return [
            record("toy", m, s) | {"status": "done now", "steps_now": 1}
            for m in methods
            for s in seeds
        ]

    monkeypatch.setattr("dbmtl.report.results_page.run_all", runs)
    assert len(ask("toy", "EW", "", "cpu", "", jobs=2)) == 3
    ask("toy", "EW", 7, "cpu", "25m")
    assert asked == [
        ("toy", ["EW"], [0, 1, 2], "cpu", None, {"jobs": 2}),
        ("toy", ["EW"], [7], "cpu", "25m", {}),
    ]


@pytest.mark.parametrize(
    "change, budget, message",
    [
        ({"steps_now": 0}, "", "took no optimizer step"),
        ({"state": "stopped"}, "", "is stopped"),
        ({"state": "pending", "status": "pending"}, "", "is pending"),
        ({"state": "stopped"}, "1m", None),
        ({"state": "pending", "status": "pending", "steps_now": 0}, "1m", None),
        ({"state": "diverged"}, "", None),
        ({"status": "already there", "steps_now": 0}, "", None),
    ],
)
def test_pages_ask_checks_that_runs_were_made(monkeypatch, change, budget, message):
    made = [record("toy", "EW") | {"status": "done now", "steps_now": 9} | change]
    monkeypatch.setattr("dbmtl.report.results_page.run_all", lambda *args, **options: made)
    if message is None:
        assert ask("toy", "EW", "0", "cpu", budget) == made
    else:
        with pytest.raises(RuntimeError, match=message):
            ask("toy", "EW", "0", "cpu", budget)
    with pytest.raises(RuntimeError, match="1 runs came back"):
        ask("toy", "EW,DB-MTL", "0", "cpu", budget)


# --------------------------------------------------------------------------------------------- page


def test_pages_improvements_by_hand():
    gains = {"segmentation": 6.0, "depth": 3.0, "normal": -3.0}
    runs = [record("nyuv2", "EW", seed, gains=gains) for seed in (0, 1)]
    page = page_of("nyuv2", *runs, stl=2)
    assert page.gains["EW"][1] == pytest.approx(gains) and page.gain["EW"] == pytest.approx(
        {0: 2.0, 1: 2.0}
    )
    assert (
        page.gain["STL"] == {0: 0.0, 1: 0.0} and page.tasks == list(gains) and page.scale == "cpu"
    )
    (row,) = rows_of(page, method="EW")
    assert row["delta_p"] == Interval(pytest.approx(2.0), pytest.approx(2.0), pytest.approx(2.0), 2)
    assert row["worst task"] == "normal (-3 %)" and row["mean rank"] == 1
    assert row["mIoU"].mean == pytest.approx(10.6) and row["AErr"].mean == pytest.approx(9.7)
    assert row["W30"].mean == pytest.approx(9.7) and row["Median"].mean == pytest.approx(10.3)


def test_pages_methods_are_in_the_order_of_the_registry():
    names = ["DB-MTL", "UW", "EW"]
    assert page_of("toy", *(record("toy", name) for name in names)).methods == [
        "STL",
        "EW",
        "UW",
        "DB-MTL",
    ]
    assert page_of("toy", record("toy", "EW+log"), record("toy", "DB-MTL")).methods == [
        "STL",
        "DB-MTL",
        "EW+log",
    ]


def test_pages_show_committed_records_before_those_made_now(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    made = [record("nyuv2", name, scale="smoke") for name in ("STL", "EW")]
    page = open_page("nyuv2", made, paper="nyuv2")
    assert page.scale == "not run" and page.records == [] and page.folder == tmp_path / "figures"
    for name in ("STL", "EW", "DB-MTL"):
        write_record(record("nyuv2", name, gain=1.0), tmp_path / "figures" / "runs")
    page = open_page("nyuv2", made, paper="nyuv2")
    assert (page.scale, page.methods) == (
        "cpu",
        ["STL", "EW", "DB-MTL"],
    ) and page.folder == tmp_path / "figures"
    assert page.printed and "Early training" in page.about and "real" in page.about
    own = open_page("nyuv2", made, paper="nyuv2", only_made=True)
    assert own.scale == "smoke" and own.methods == ["STL", "EW"] and not own.printed


@pytest.mark.parametrize("benchmark", ["nyuv2", "cityscapes", "office31"])
def test_pages_of_generated_data_compare_with_nothing(benchmark):
    made = page_of(benchmark, record(benchmark, "EW", scale="smoke"), paper=benchmark)
    assert (
        made.printed == {}
        and made.printed_gain == {}
        and "no printed numbers to compare with" in made.about
    )
    assert {row["source"] for row in result_rows(made)} == {"floor", "ours"}
    assert {row["source"] for row in gain_rows(made)} == {"ours"}
    assert "paper's" not in table_caption(made, "X.") and len(gains_figure(made).axes) == 1 + len(
        made.tasks
    )


def test_pages_at_paper_scale_make_no_excuse():
    page = page_of("nyuv2", record("nyuv2", "EW", scale="paper"), paper="nyuv2")
    assert "Early" not in page.about and "Nothing in the paper" not in page.about and page.printed
    assert "Nothing in the paper" in page_of("pacs", record("pacs", "EW")).about


def test_pages_say_what_was_lost_and_what_records_note():
    runs = [
        record("nyuv2", "EW", state="diverged"),
        record("nyuv2", "DB-MTL", notes=["From scratch"]),
    ]
    about = page_of("nyuv2", *runs, paper="nyuv2").about
    assert "EW seed 0 diverged at step 5 of 30 (the loss of depth is not finite)." in about
    assert " From scratch." in about and about.index("Ours:") == 0


def test_pages_refuse_what_cannot_be_compared():
    with pytest.raises(ValueError, match="scale differ"):
        page_of("nyuv2", record("nyuv2", "EW"), record("nyuv2", "UW", scale="paper"))
    with pytest.raises(ValueError, match="did you mean 'office31'"):
        page_of("office31", record("office31", "EW"), paper="office")


# ------------------------------------------------------------------------------------------- tables


@pytest.mark.parametrize(
    "benchmark, column, stl, printed",
    [("nyuv2", "mIoU", 53.5, "1.15 ± 0.16"), ("office31", "amazon", 86.61, "1.05 ± 0.2")],
)
def test_pages_put_printed_rows_below_ours(benchmark, column, stl, printed):
    page = page_of(
        benchmark, record(benchmark, "DB-MTL", gain=5.0), record(benchmark, "FAMO"), paper=benchmark
    )
    rows = result_rows(page)
    shown = [(row["method"], row["source"]) for row in rows]
    assert shown[:6] == [
        ("constant prediction", "floor"),
        ("STL", "ours"),
        ("STL", "paper"),
        ("DB-MTL", "ours"),
        ("DB-MTL", "paper"),
        ("FAMO", "ours"),
    ]
    rest = [name for name in paper_table(benchmark) if name not in ("STL", "DB-MTL")]
    assert shown[6:] == [(name, "paper; ours not run") for name in rest] and len(rest) > 15
    assert rows[2][column] == stl and rows[4]["delta_p"] == printed
    assert rows[1][column] == 10 and rows[3][column] == pytest.approx(10.5)  # one seed: no interval
    assert (
        rows[2]["worst task"] is None
        and rows[4]["worst task"].endswith(" %)")
        and "mean rank" not in rows[4]
    )


def test_pages_know_the_printed_average_of_each_half():
    page = page_of(
        "nyuv2", record("nyuv2", "loss-only"), record("nyuv2", "gradient-only"), paper="nyuv2"
    )
    total, each = printed_gains(page, ["loss-only", "gradient-only", "EW"])
    assert {name: found[0] for name, found in total.items()} == {
        "loss-only": 0.06,
        "gradient-only": 0.76,
        "EW": -1.78,
    }
    assert list(each) == ["EW"]  # Table 5 has no metrics


def test_pages_columns_are_metrics_or_tasks():
    columns = metric_columns(get_benchmark("nyuv2").directions)
    assert list(columns.values()) == [
        "mIoU",
        "PAcc",
        "AErr",
        "RErr",
        "Mean",
        "Median",
        "W11.25",
        "W22.5",
        "W30",
    ]
    assert list(metric_columns(get_benchmark("office31").directions).values()) == [
        "amazon",
        "dslr",
        "webcam",
    ]
    both = {"a": {"x": "up", "y": "up"}, "b": {"x": "up"}}
    assert metric_columns(both) == {("a", "x"): "a x", ("a", "y"): "y", ("b", "x"): "b"}


def test_pages_rows_give_reasons_for_missing_numbers():
    runs = [
        record("nyuv2", "EW", at_floor=["normal"]),
        record("nyuv2", "UW", state="diverged"),
        record("nyuv2", "DB-MTL", gain=2.0),
    ]
    page = page_of("nyuv2", *runs)
    (floored,), (lost,), (good,) = (rows_of(page, method=name) for name in ("EW", "UW", "DB-MTL"))
    assert floored["delta_p"] == "not trained: normal" and floored["worst task"] is None
    assert lost["delta_p"] == "diverged" and lost["mIoU"] is None
    assert good["delta_p"].mean == pytest.approx(2.0) and good["mean rank"] == 1
    (floor,) = rows_of(page, source="floor")
    assert floor["mIoU"] == 5 and floor["AErr"] == 15


def test_pages_captions_say_how_numbers_were_made():
    page = page_of("nyuv2", record("nyuv2", "EW"), paper="nyuv2", stl=2)
    text = table_caption(page, "Table 1: rooms.")
    for part in (
        "Table 1: rooms. ±",
        "Student's 95 %",
        "in the paper's",
        "constant prediction",
        "best test epoch",
        "nyuv2 at cpu scale",
        "cpu: test",
        "Early training",
    ):
        assert part in text
    assert "Epochs: none." in table_caption(replace(page, protocol="last ten"), "X.")


# ----------------------------------------------------------------------------------------- pictures


def several_tasks(count):
    """The toy with so many tasks."""
    toy = get_benchmark("toy")
    tasks = tuple(
        Task(f"task {t}", toy.tasks[0].loss, toy.tasks[0].metrics, toy.tasks[0].meter)
        for t in range(count)
    )
    return Benchmark(f"toy-{count}", tasks, toy.scales, toy.load, toy.network, toy.optimizer)


@pytest.mark.full
@pytest.mark.parametrize("tasks", [1, 2, 11])
@pytest.mark.parametrize("methods", [1, 21])
def test_pages_pictures_have_room_for_everything(tasks, methods):
    use_style()
    benchmark = several_tasks(tasks)
    names = [name for name in method_names() if name != "STL"][:methods]
    page = page_of(
        benchmark, *(record(benchmark, name, gain=i - 9.0) for i, name in enumerate(names))
    )
    for figure, panels in ((gains_figure(page), 1 + tasks), (losses_figure(page), tasks)):
        assert (
            palette_png(figure)[:4] == b"\x89PNG"
        )  # -W error: a layout that does not fit is a warning
        drawn = [ax for ax in figure.axes if ax.axison]
        titles = [ax.get_title(loc="left") for ax in drawn]
        assert len(drawn) == panels and all(
            f"task {t}" in title for t, title in enumerate(titles[-tasks:])
        )
        boxes = [ax.get_tightbbox() for ax in drawn]
        edge = figure.bbox
        assert all(box.x0 >= -1 and box.x1 <= edge.x1 + 1 and box.y0 >= -1 for box in boxes)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
    assert (
        len(gain_rows(page)) == methods * (1 + tasks)
        and len(loss_rows(page)) == (1 + methods) * tasks * 2
    )


@pytest.mark.full
@pytest.mark.parametrize("count", [2, 6, 20])
def test_pages_bars_have_labels_that_do_not_touch(count):
    use_style()
    names = [name for name in method_names() if name != "STL"][:count]
    page = page_of(
        "nyuv2",
        *(record("nyuv2", name, gain=i - 3.0) for i, name in enumerate(names)),
        paper="nyuv2",
    )
    figure = gains_figure(page)
    figure.draw_without_rendering()
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert [title.split(",")[0] for title in titles] == 2 * [
        "$\\Delta_p$",
        "segmentation",
        "depth",
        "normal",
    ]
    for ax in figure.axes:
        if count == 20 and not ax.get_title(loc="left").startswith(("depth", "normal")):
            assert not any(
                label.get_visible() for label in ax.get_xticklabels()
            )  # the names stand below
            continue
        labels = [label.get_window_extent() for label in ax.get_xticklabels()]
        assert len(labels) == count
        if count > 5:  # vertical: their boxes are the letters
            assert all(a.x1 <= b.x0 + 0.5 for a, b in zip(labels[:-1], labels[1:], strict=True))
    ours, printed = figure.axes[0], figure.axes[4]
    assert [bar.get_height() for bar in ours.patches] == pytest.approx(
        [i - 3.0 for i in range(count)]
    )
    assert len(printed.patches) == sum(name in paper_table("nyuv2") for name in names)


def test_pages_picture_shows_printed_values_below_and_marks_what_is_missing():
    runs = [record("nyuv2", "FAMO", gain=1.0), record("nyuv2", "EW", at_floor=["depth"])]
    page = page_of("nyuv2", *runs, paper="nyuv2")
    figure = gains_figure(page)
    words = [[text.get_text() for text in ax.texts] for ax in figure.axes]
    assert words == [["not trained"], [], ["not trained"], []] + 4 * [["not printed"]]
    assert figure.axes[4].patches[0].get_height() == pytest.approx(
        paper_summary("nyuv2")["EW"].value
    )
    only = gains_figure(page, ["FAMO"])
    assert [len(ax.patches) for ax in only.axes] == [1, 1, 1, 1, 0, 0, 0, 0]


def test_pages_gain_rows_are_the_bars():
    runs = [record("nyuv2", "EW", seed, gain=2.0) for seed in (0, 1)]
    page = page_of("nyuv2", *runs, stl=2, paper="nyuv2")
    rows = gain_rows(page)
    ours = [row for row in rows if row["source"] == "ours"]
    assert len(ours) == 8 and {row["seed"] for row in ours} == {0, 1}
    assert all(row["percent"] == pytest.approx(2.0) and row["method"] == "EW" for row in ours)
    assert {row["task"] for row in ours} == {"delta_p", *page.tasks}
    printed = {row["task"]: row for row in rows if row["source"] == "paper"}
    total, each = printed_gains(page, ["EW", "FAMO"])
    assert printed["delta_p"]["percent"] == total["EW"][0] == paper_summary("nyuv2")["EW"].value
    assert {task: row["percent"] for task, row in printed.items() if task != "delta_p"} == each[
        "EW"
    ][0]
    assert {row["seed"] for row in printed.values()} == {""} and set(each) == {"EW"}
    table = paper_table("nyuv2")
    depth = [
        100 * (1 - table["EW"]["depth"][m] / table["STL"]["depth"][m]) for m in ("AErr", "RErr")
    ]
    assert each["EW"][0]["depth"] == pytest.approx(sum(depth) / 2)


def test_pages_losses_are_those_of_the_records():
    page = page_of("nyuv2", record("nyuv2", "EW", 0), record("nyuv2", "EW", 1))
    rows = [row for row in loss_rows(page, ["EW"]) if row["task"] == "depth"]
    assert [(row["seed"], row["epoch"], row["train"]) for row in rows] == [
        (0, 1, 2),
        (0, 2, 1),
        (1, 1, 2),
        (1, 2, 2),
    ]
    figure = losses_figure(page)
    assert {ax.get_yscale() for ax in figure.axes if ax.axison} == {"log"}
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["STL", "EW"]

"""Pages of results: what is asked for, which records are shown, beside which printed numbers, and
the pictures."""

import math

import matplotlib.pyplot as plt
import pytest

from dbmtl.benchmarks.base import Benchmark, Task, get_benchmark
from dbmtl.experiments.intervals import Interval
from dbmtl.experiments.records import configuration, run_identity, write_record
from dbmtl.registry import method_names
from dbmtl.report import results_page
from dbmtl.report.paper import paper_summary, paper_table
from dbmtl.report.results_page import (
    NOT_IN_THE_PAPER,
    ask,
    difference_rows,
    gain_rows,
    gains_figure,
    in_words,
    log_ratio,
    metric_columns,
    open_page,
    result_rows,
    save_smoke_pictures,
    show_difference,
    show_gains,
    show_states,
    show_table,
    show_training,
    training_figure,
)
from dbmtl.report.style import palette_png, use_style

NOTEBOOK = "15_paper/01_table1_nyuv2"


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture
def shown(tmp_path, monkeypatch):
    """What a page displays; its files go to a folder of the test."""
    texts = []
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    monkeypatch.setattr(results_page, "display", lambda markdown: texts.append(markdown.data))
    monkeypatch.setattr(plt, "show", lambda: None)
    return texts


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
    benchmark = get_benchmark(benchmark)
    test = {}
    floors = {}
    for task, metrics in benchmark.directions.items():
        percent = (gains or {}).get(task, gain)
        signs = {metric: 1 if better == "up" else -1 for metric, better in metrics.items()}
        floors[task] = {metric: 10 - 5 * sign for metric, sign in signs.items()}
        test[task] = {metric: 10 + sign * percent / 10 for metric, sign in signs.items()}
        if task in at_floor:
            test[task] = floors[task]
    config = configuration(benchmark, method, seed, scale)
    selections = {
        "best validation epoch": {"epoch": 1, "test": test},
        "average of the last ten epochs": {"epochs": 2, "test": test},
    }
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
        "selected": selections if state == "finished" else {},
        "curves": {
            "epochs": [1, 2],
            "train": {task: [2.0, 1.0 + seed] for task in benchmark.directions},
        },
    } | changes


def page_of(benchmark, *runs, paper=None, stl=1, **options):
    """A page of these runs and of `stl` seeds of STL."""
    scale = runs[0]["config"]["scale"]["name"] if runs else "cpu"
    baseline = [record(benchmark, "STL", seed, scale) for seed in range(stl)]
    return open_page(
        NOTEBOOK, benchmark, [*baseline, *runs], paper=paper, only_made=True, **options
    )


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
    assert page.tasks == list(gains) and page.scale == "cpu" and page.methods == ["EW"]
    (row,) = rows_of(page, method="EW")
    two = pytest.approx(2.0)
    assert (
        row["delta_p, best epoch"] == row["delta_p, last ten epochs"] == Interval(two, two, two, 2)
    )
    assert row["worst task"] == "normal (-3 %)" and row["mean rank"] == 1
    assert row["mIoU"].mean == pytest.approx(10.6) and row["AErr"].mean == pytest.approx(9.7)
    assert row["W30"].mean == pytest.approx(9.7) and row["Median"].mean == pytest.approx(10.3)


def test_pages_methods_are_in_the_order_of_the_registry():
    names = ["DB-MTL", "UW", "EW"]
    assert page_of("toy", *(record("toy", name) for name in names)).labels == [
        *("STL", "EW", "UW", "DB-MTL")
    ]
    page = page_of("toy", record("toy", "EW+log"), record("toy", "DB-MTL"), methods=["FAMO"])
    assert page.labels == ["STL", "EW+log", "DB-MTL", "FAMO"]
    assert page.why_none(page.methods) == {"FAMO": "not run"}


def test_pages_show_committed_records_before_those_made_now(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    made = [record("nyuv2", name, scale="smoke") for name in ("STL", "EW")]
    page = open_page(NOTEBOOK, "nyuv2", made, paper="nyuv2")
    assert page.scale == "not run" and page.records == []
    assert page.artifacts.folder == tmp_path / "figures/paper"
    for name in ("STL", "EW", "DB-MTL"):
        write_record(record("nyuv2", name, gain=1.0), tmp_path / "figures" / "runs")
    page = open_page(NOTEBOOK, "nyuv2", made, paper="nyuv2")
    assert (page.scale, page.labels) == ("cpu", ["STL", "EW", "DB-MTL"])
    assert page.artifacts.folder == tmp_path / "figures/paper"
    assert page.printed and "early training" in page.about and "real" in page.about
    own = open_page(NOTEBOOK, "nyuv2", made, paper="nyuv2", only_made=True)
    assert own.scale == "smoke" and own.labels == ["STL", "EW"] and not own.printed
    assert own.artifacts.folder == tmp_path / "out/smoke/figures/paper"


@pytest.mark.parametrize("benchmark", ["nyuv2", "cityscapes", "office31"])
def test_pages_of_generated_data_compare_with_nothing(benchmark):
    made = page_of(benchmark, record(benchmark, "EW", scale="smoke"), paper=benchmark)
    assert made.printed == {} and made.printed_gain == {} and NOT_IN_THE_PAPER in made.about
    assert {row["source"] for row in result_rows(made)} == {"floor", "ours"}
    assert "paper" not in set(gain_rows(made, made.methods)["series"])
    assert len(gains_figure(made).axes) == 1 + len(made.tasks)


def test_pages_at_paper_scale_make_no_excuse():
    page = page_of("nyuv2", record("nyuv2", "EW", scale="paper"), paper="nyuv2")
    assert "early" not in page.about and NOT_IN_THE_PAPER not in page.about and page.printed
    assert NOT_IN_THE_PAPER in page_of("pacs", record("pacs", "EW")).about


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
    sources = [(row["method"], row["source"]) for row in rows]
    assert sources[:6] == [
        ("constant prediction", "floor"),
        ("STL", "ours"),
        ("STL", "paper"),
        ("DB-MTL", "ours"),
        ("DB-MTL", "paper"),
        ("FAMO", "ours"),
    ]
    rest = [name for name in paper_table(benchmark) if name not in ("STL", "DB-MTL")]
    assert sources[6:] == [(name, "paper; ours not run") for name in rest] and len(rest) > 15
    assert rows[2][column] == stl and rows[4]["delta_p, best epoch"] == printed
    assert rows[1][column] == 10 and rows[3][column] == pytest.approx(10.5)  # one seed: no interval
    assert rows[2]["worst task"] is None and rows[4]["worst task"].endswith(" %)")
    assert "mean rank" not in rows[4]


def test_pages_about_some_methods_show_no_others():
    page = page_of("nyuv2", record("nyuv2", "EW"), paper="nyuv2", methods=["EW", "FAMO", "UW"])
    sources = [(row["method"], row["source"]) for row in result_rows(page)]
    assert sources == [
        ("constant prediction", "floor"),
        *(("STL", "ours"), ("STL", "paper"), ("EW", "ours"), ("EW", "paper")),
        ("FAMO", "ours"),
        ("UW", "paper; ours not run"),
    ]
    assert result_rows(page)[5]["delta_p, best epoch"] == "not run"


def test_pages_columns_are_metrics_or_tasks():
    columns = metric_columns(get_benchmark("nyuv2").directions)
    assert list(columns.values()) == [
        *("mIoU", "PAcc", "AErr", "RErr", "Mean", "Median", "W11.25", "W22.5", "W30")
    ]
    assert list(metric_columns(get_benchmark("office31").directions).values()) == [
        *("amazon", "dslr", "webcam")
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
    column = "delta_p, best epoch"
    assert floored[column] == "not trained: normal" and floored["worst task"] is None
    assert lost[column] == "diverged" and lost["mIoU"] is None
    assert good[column].mean == pytest.approx(2.0) and good["mean rank"] == 1
    (floor,) = rows_of(page, source="floor")
    assert floor["mIoU"] == 5 and floor["AErr"] == 15


def test_pages_captions_say_how_numbers_were_made(shown):
    page = page_of("nyuv2", record("nyuv2", "EW"), paper="nyuv2", stl=2)
    show_table(page, "table1", "Table 1: rooms.", beside={"code": {"EW": "LibMTL"}})
    parts = [
        *("Table 1: rooms. ±", "Student's 95 %", "in the paper's", "constant prediction"),
        *("best validation epoch", "cpu scale", "cpu: test", "early training"),
    ]
    assert [part for part in parts if part not in shown[0]] == []
    lines = (page.artifacts.folder / "table1.csv").read_text().splitlines()
    assert lines[0].startswith("method,source,code,mIoU")
    assert [line.split(",")[2] for line in lines if line.startswith("EW,")] == ["", "LibMTL"]
    assert (page.artifacts.folder / "cards/table1.json").exists()


# ------------------------------------------------------------------------------------- differences


def test_differences_by_both_rules_and_by_task():
    runs = [record("nyuv2", "EW", seed, gain=1.0) for seed in range(3)]
    runs += [record("nyuv2", "DB-MTL", seed, gain=2.0 + seed) for seed in range(3)]
    page = page_of("nyuv2", *runs, stl=3, paper="nyuv2")
    rows = difference_rows(page)
    summary = paper_summary("nyuv2")
    assert rows[0]["paper"] == summary["DB-MTL"].value - summary["EW"].value
    assert rows[0]["ours, best epoch"].mean == pytest.approx(2.0)
    assert (
        rows[0]["verdict"] == "undecided" and [row["DB-MTL - EW"] for row in rows[1:]] == page.tasks
    )
    assert rows[1]["ours, last ten epochs"].mean == pytest.approx(2.0)
    table = paper_table("nyuv2")
    depth = [
        100
        * sum(1 - table[name]["depth"][metric] / table["STL"]["depth"][metric] for metric in errors)
        / 2
        for name in ("DB-MTL", "EW")
        for errors in [("AErr", "RErr")]
    ]
    assert rows[2]["paper"] == pytest.approx(depth[0] - depth[1])
    sentence = in_words(page.comparison, "DB-MTL", "EW", rows[0]["paper"])
    assert sentence.startswith(
        "DB-MTL minus EW is 2.0 ± 2.5 by the best epoch and 2.0 ± 2.5 by the"
    )
    assert sentence.endswith("the paper prints 2.93. Verdict: undecided.")


def test_differences_that_the_paper_does_not_print(shown):
    runs = [
        record("pacs", name, seed, gain=g)
        for seed in range(3)
        for name, g in (("EW", 1.0), ("DB-MTL", 2.0 + 0.01 * seed))
    ]
    page = page_of("pacs", *runs, stl=3)
    show_difference(page)
    assert len(shown) == 1 and shown[0].endswith(": a decided difference.")
    assert in_words(page.comparison, "DB-MTL", "FAMO") == (
        "We cannot compare DB-MTL with FAMO: FAMO not run."
    )
    equal = in_words(page.comparison, "EW", "STL")
    assert "1.0000 ± 0.0000" in equal


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
@pytest.mark.parametrize("tasks", [1, 2, 4])
@pytest.mark.parametrize("methods", [1, 21])
def test_pages_pictures_have_room_for_everything(tasks, methods):
    use_style()
    benchmark = several_tasks(tasks)
    names = [name for name in method_names() if name != "STL"][:methods]
    runs = [record(benchmark, name, gain=i - 9.0) for i, name in enumerate(names)]
    page = page_of(benchmark, *runs)
    for figure, panels in ((gains_figure(page), 1 + tasks), (training_figure(page), tasks)):
        picture = palette_png(figure)
        assert picture[:4] == b"\x89PNG"  # -W error: a layout that does not fit is a warning
        drawn = [ax for ax in figure.axes if ax.axison]
        titles = [ax.get_title() for ax in drawn]
        assert len(drawn) == panels and titles[-tasks:] == [f"task {t}" for t in range(tasks)]
        boxes = [ax.get_tightbbox() for ax in drawn]
        edge = figure.bbox
        assert all(box.x0 >= -1 and box.x1 <= edge.x1 + 1 and box.y0 >= -1 for box in boxes)
        assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
        texts = [text for ax in drawn for text in (*ax.get_xticklabels(), *ax.get_yticklabels())]
        assert min(text.get_fontsize() for text in texts) >= 8
    assert len(gain_rows(page, names)) == methods * (2 + tasks)


def test_pages_picture_has_ours_and_the_papers_in_one_row():
    runs = [record("nyuv2", "FAMO", gain=1.0), record("nyuv2", "EW", at_floor=["depth"])]
    page = page_of("nyuv2", *runs, paper="nyuv2")
    figure = gains_figure(page, ["EW", "FAMO", "UW"])
    left, *tasks = figure.axes
    assert [tick.get_text() for tick in left.get_yticklabels()] == ["EW", "FAMO", "UW"]
    assert [text.get_text() for text in left.texts] == ["not trained", "not run"]
    printed = [line for line in left.lines if line.get_marker() == "D"]
    summary = paper_summary("nyuv2")
    assert [float(line.get_xdata()[0]) for line in printed] == [
        summary["EW"].value,
        summary["UW"].value,
    ]
    assert len({ax.get_xlim() for ax in tasks}) == 1  # one axis for all tasks


def test_pages_gain_rows_are_what_is_drawn():
    runs = [record("nyuv2", "EW", seed, gain=2.0) for seed in (0, 1)]
    page = page_of("nyuv2", *runs, stl=2, paper="nyuv2")
    rows = gain_rows(page, page.methods)
    ours = rows[rows["series"] != "paper"]
    assert set(ours["seed"]) == {0, 1} and set(ours["row"]) == {"EW"} and len(ours) == 2 * (2 + 3)
    assert ours.loc[ours["panel"] == "delta_p", "value"].tolist() == pytest.approx([2.0] * 4)
    depth = ours.loc[ours["panel"] == "depth", "value"].tolist()
    assert depth == pytest.approx([-math.log(0.98)] * 2)
    paper = rows[rows["series"] == "paper"].set_index("panel")["value"]
    assert paper["delta_p"] == paper_summary("nyuv2")["EW"].value
    table = paper_table("nyuv2")
    logs = [math.log(table["STL"]["depth"][m] / table["EW"]["depth"][m]) for m in ("AErr", "RErr")]
    assert paper["depth"] == pytest.approx(sum(logs) / 2)


def test_log_ratios():
    ratio = log_ratio({"x": 2.0, "y": 3.0}, {"x": 1.0, "y": 6.0}, {"x": "up", "y": "down"})
    assert ratio == pytest.approx(math.log(2))


def test_pages_losses_are_those_of_the_records(shown):
    page = page_of("nyuv2", record("nyuv2", "EW", 0), record("nyuv2", "EW", 1))
    show_training(page, "training", "Rooms", ["EW"])
    lines = (page.artifacts.folder / "training.csv").read_text().splitlines()
    assert [line for line in lines if line.startswith("depth")] == [
        *("depth,EW,0,1,2", "depth,EW,0,2,1", "depth,EW,1,1,2", "depth,EW,1,2,2")
    ]
    figure = training_figure(page)
    assert {ax.get_yscale() for ax in figure.axes if ax.axison} == {"log"}
    assert [text.get_text() for text in figure.axes[-1].get_legend().get_texts()] == ["STL", "EW"]


def test_pages_without_runs_say_so_in_words(shown):
    page = open_page(NOTEBOOK, "officehome", paper=None)
    show_gains(page, "gains", "Office-Home")
    show_training(page, "training", "Office-Home")
    assert shown == ["No picture: Ours: officehome was not run."] * 2
    assert not page.artifacts.folder.exists()


def test_smoke_runs_are_no_results(shown, tmp_path):
    made = [record("nyuv2", name, scale="smoke") for name in ("STL", "EW")]
    assert show_states(NOTEBOOK, "nyuv2", made, "table1") == ["finished"]
    folder = tmp_path / "out/smoke/figures/paper"
    assert {path.name for path in folder.glob("*.png")} == {
        "table1_gains.png",
        "table1_training.png",
    }
    assert not (tmp_path / "figures").exists()
    with pytest.raises(ValueError, match="not of smoke scale"):
        save_smoke_pictures(NOTEBOOK, [record("nyuv2", "EW")], table1=plt.figure())
    assert show_states(NOTEBOOK, "nyuv2", [record("nyuv2", "EW")], "table1") == ["finished"]

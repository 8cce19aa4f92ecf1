"""Several pages at once: asking, folders, captions, and two methods beside the paper's."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.records import configuration
from dbmtl.report.results_page import difference_rows, open_page, run_states, save_smoke_figures
from dbmtl.report.several_benchmarks import (
    ask_all,
    beside_delta_p,
    curves_above_ratios,
    few_task_rows,
    pages_about,
    pages_folder,
    printed_pairs,
    two_methods_bars,
    two_methods_figure,
    two_methods_rows,
)


def record(benchmark, method, seed, gain, scale="cpu", **changes):
    """Every metric of STL is 10; a gain of g percent moves it by g/10 to its better side."""
    directions = get_benchmark(benchmark).directions
    signs = {
        task: {metric: 1 if way == "up" else -1 for metric, way in ways.items()}
        for task, ways in directions.items()
    }
    test = {t: {m: 10 + sign * gain / 10 for m, sign in ms.items()} for t, ms in signs.items()}
    floors = {t: {m: 10 - 5 * sign for m, sign in ms.items()} for t, ms in signs.items()}
    return {
        "config": configuration(benchmark, method, seed, scale),
        "state": "finished",
        "steps": 20,
        "directions": directions,
        "selected": {
            "best validation epoch": {"test": test},
            "average of the last ten epochs": {"test": test},
        },
        "floors": {"test": floors},
        "curves": {"epochs": [1, 2], "train": dict.fromkeys(directions, [2.0, 1.0])},
    } | changes


def page(benchmark="office31", paper="office31", **gains):
    gains = {"STL": [0, 0, 0], **{name.replace("_", "-"): runs for name, runs in gains.items()}}
    runs = [
        record(benchmark, m, s, gain)
        for m, values in gains.items()
        for s, gain in enumerate(values)
    ]
    return open_page(benchmark, runs, paper=paper, only_made=True)


@pytest.fixture
def pages():
    yield {
        "office31": page(IMTL_L=[1, 2, 3], loss_only=[3, 4, 5.5]),
        "nyuv2": open_page("nyuv2", paper="nyuv2", methods=["none of the records"]),
    }
    plt.close("all")


TITLES = {"office31": "Office-31", "nyuv2": "NYUv2"}
PAIR = ["IMTL-L", "loss-only"]


def test_several_ask_each_with_its_own_scale_and_steps(monkeypatch):
    asked = []

    def ask(*args, **options):
        asked.append((args, options))
        return [{"state": "finished"}]

    monkeypatch.setattr("dbmtl.report.several_benchmarks.ask", ask)
    made = ask_all(
        ["a", "b"],
        "EW",
        "0",
        {"a": "cpu", "b": "generated"},
        "1m",
        monitor_every={"a": 5, "b": 7},
        jobs=2,
    )
    assert asked == [
        (("a", "EW", "0", "cpu", "1m"), {"monitor_every": 5, "jobs": 2}),
        (("b", "EW", "0", "generated", "1m"), {"monitor_every": 7, "jobs": 2}),
    ]
    assert run_states(made) == ["finished"]
    ask_all(["a"], "EW", "0", "smoke", monitor_every=3)
    assert asked[-1] == (("a", "EW", "0", "smoke", ""), {"monitor_every": 3})


def test_several_unfinished_runs_decide_the_folder(pages, tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    assert pages_folder(pages) == tmp_path / "figures"
    pages["office31"].records.append({"state": "stopped"})
    assert pages_folder(pages) == tmp_path / "out" / "unfinished"


def test_several_captions_name_every_benchmark(pages):
    about = pages_about(pages, TITLES)
    assert about.startswith("Office-31: office31 at cpu scale") and "Ours" not in about
    assert about.endswith("NYUv2: nyuv2 was not run.")


def test_several_columns_beside_delta_p(pages):
    cells = beside_delta_p(pages["office31"], PAIR, places=1)["loss-only"]
    assert cells["gain by task (%)"] == "amazon 4.2, dslr 4.2, webcam 4.2"
    assert cells["metric average"].mean == pytest.approx(-12.5 / 3)
    assert cells["mean rank"] == 1 and cells["worst task"] == "amazon (4.2 %)"
    assert beside_delta_p(pages["nyuv2"], PAIR)["IMTL-L"]["gain by task (%)"] is None


def test_several_two_methods_in_numbers(pages):
    printed = printed_pairs(2, PAIR, {"log": "loss-only"})
    old, new, *missing = two_methods_rows(pages, printed, PAIR, TITLES)
    assert "verdict" not in old and new["second minus first"].mean == pytest.approx(6.5 / 3)
    assert new["verdict"] == "same sign" and new["paper: second minus first"] > 0
    assert [row["delta_p"] for row in missing] == ["not run"] * 2
    assert missing[1]["verdict"] == "not run"
    rows = two_methods_bars(pages, printed, PAIR)
    assert [row["source"] for row in rows].count("ours") == 6 and len(rows) == 6 + 4


def test_several_two_methods_in_a_picture(pages):
    printed = printed_pairs(2, PAIR, {"log": "loss-only"})
    ours, empty, *paper = two_methods_figure(pages, printed, PAIR, TITLES).axes
    assert ours.get_title(loc="left") == "Office-31\nours, cpu"
    assert [bar.get_height() for bar in ours.patches] == pytest.approx([2.0, 12.5 / 3])
    assert [text.get_text() for text in empty.texts] == ["not run"] * 2
    assert [len(ax.patches) for ax in paper] == [2, 2]


def test_several_curves_stand_above_an_empty_panel(pages):
    figure, wide = curves_above_ratios(pages, "train", PAIR, "epoch", "loss")
    titles = [ax.get_title(loc="left") for ax in figure.axes]
    assert titles[:2] == ["office31: amazon", "office31: dslr"] and "nyuv2: depth" in titles
    assert not wide.lines and wide is figure.axes[-1]
    rows = few_task_rows(pages, "train", PAIR)
    assert len(rows) == 3 * 2 * 3 * 2 and rows[0]["benchmark"] == "office31"


def test_several_difference_rows_are_delta_p_and_every_task():
    rows = difference_rows(page(EW=[1, 1, 1], **{"DB_MTL": [3, 4, 5]}))
    assert [row["DB-MTL - EW"] for row in rows] == ["delta_p", "amazon", "dslr", "webcam"]
    ours = "ours, best epoch"
    assert rows[0][ours].mean == pytest.approx(3)
    assert rows[0]["ours, last ten epochs"] == rows[0][ours]
    assert rows[0]["verdict"] == "same sign"  # 3 ± 2.5 holds the printed 1.66
    assert rows[1][ours].mean == pytest.approx(3) and "verdict" not in rows[1]
    missing = difference_rows(page(EW=[1, 1, 1]))
    assert missing[1][ours] == "DB-MTL not run" and missing[0]["verdict"] == "not run"


def test_several_smoke_figures_go_to_their_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    save_smoke_figures(a=plt.figure(), b=(plt.figure(), [{"x": 1}]))
    made = sorted(path.name for path in (tmp_path / "out" / "smoke" / "figures").iterdir())
    assert made == ["a.png", "a.svg", "b.csv", "b.png", "b.svg"] and plt.get_fignums() == []

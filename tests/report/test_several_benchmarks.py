"""Several pages at once: asking, folders, captions, one difference on each, smoke pictures."""

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
from helpers.made_up import page, record

from dbmtl.report.comparison import minus
from dbmtl.report.results_page import open_page, run_states, save_smoke_pictures
from dbmtl.report.several_benchmarks import (
    about_all,
    artifacts_of,
    ask_all,
    difference_figure,
    difference_rows,
)

TITLES = {"office31": "Office-31", "nyuv2": "NYUv2"}
WEIGHTS = minus("loss-only", "IMTL-L")
NOTEBOOK = "15_paper/08_figure2_imtl_l"


@pytest.fixture
def pages():
    gains = {"IMTL-L": [1, 2, 3], "loss-only": [3, 4, 5.5]}
    yield {
        "office31": page("office31", gains, "office31", notebook=NOTEBOOK),
        "nyuv2": open_page(NOTEBOOK, "nyuv2", paper="nyuv2", methods=["none of the records"]),
    }
    plt.close("all")


def test_several_ask_each_with_its_own_scale_and_steps(monkeypatch):
    asked = []

    def ask(*args, **options):
        asked.append((args, options))
        return [{"state": "finished"}]

    monkeypatch.setattr("dbmtl.report.several_benchmarks.ask", ask)
    scales = {"a": "cpu", "b": "generated"}
    steps = {"a": 5, "b": 7}
    made = ask_all(["a", "b"], "EW", "0", scales, "1m", monitor_every=steps, jobs=2)
    assert asked == [
        (("a", "EW", "0", "cpu", "1m"), {"monitor_every": 5, "jobs": 2}),
        (("b", "EW", "0", "generated", "1m"), {"monitor_every": 7, "jobs": 2}),
    ]
    assert run_states(made) == ["finished"]
    ask_all(["a"], "EW", "0", "smoke", monitor_every=3)
    assert asked[-1] == (("a", "EW", "0", "smoke", ""), {"monitor_every": 3})


def test_several_unfinished_runs_decide_the_folder(pages, tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    assert artifacts_of(pages).folder == tmp_path / "figures" / "paper"
    stopped = record("office31", "EW", 0, 1) | {"state": "stopped"}
    pages["office31"].records.append(stopped)
    assert artifacts_of(pages).folder == tmp_path / "out" / "unfinished" / "paper"


def test_several_captions_name_every_benchmark(pages):
    about = about_all(pages, TITLES)
    assert about.startswith("Ours: Office-31, cpu scale, ") and "; on " in about
    assert "Not run: NYUv2." in about
    assert "sizes cannot: early training (Office-31)." in about


def test_several_captions_say_what_is_common_once(pages):
    notes = ["frozen: not comparable", "width 8 instead of 64"]
    for number, run in enumerate(pages["office31"].records):
        run["notes"] = [*notes, "three batches a step"] if number else notes
    pages["qm9"] = open_page(NOTEBOOK, "qm9", [record("qm9", "EW", 0, 1, "early")], only_made=True)
    pages["office31"].records[0]["device"] = "cuda: test"
    about = about_all(pages, TITLES | {"qm9": "QM9"})
    assert about.startswith("Ours: Office-31, cpu scale, ") and about.count("steps on ") == 2
    assert "frozen (Office-31), width 8 instead of 64 (Office-31)." in about
    assert "The paper prints no such numbers for QM9. three batches a step (Office-31)." in about


def test_several_one_difference_in_numbers(pages):
    printed = {"office31": 1.56, "nyuv2": 1.98}
    ours, missing = difference_rows(pages, TITLES, WEIGHTS, printed)
    assert ours["ours, best epoch"].mean == pytest.approx(6.5 / 3)
    assert ours["paper"] == 1.56 and ours["verdict"].startswith("same sign")
    assert missing["verdict"] == "not run"


def test_several_one_difference_in_a_picture(pages):
    printed = {"office31": 1.56, "nyuv2": 1.98}
    (ax,) = difference_figure(pages, TITLES, WEIGHTS, printed, "points").axes
    assert [text.get_text() for text in ax.texts] == ["not run"]
    rows = [tick.get_text() for tick in ax.get_yticklabels()]
    assert rows == ["Office-31\n(cpu)", "NYUv2"]


def test_several_smoke_pictures_go_to_their_own_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    made = {"office31": [record("office31", "EW", 0, 1, "smoke")]}
    save_smoke_pictures(NOTEBOOK, made, a=plt.figure(), b=(plt.figure(), [{"x": 1}]))
    folder = tmp_path / "out" / "smoke" / "figures" / "paper"
    written = sorted(path.name for path in folder.iterdir() if path.is_file())
    assert written == ["a.png", "a.svg", "b.csv", "b.png", "b.svg"] and plt.get_fignums() == []

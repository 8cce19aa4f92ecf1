"""The ablation: common tasks, Holm's correction, pages without runs."""

import matplotlib.pyplot as plt
import pytest
from helpers.made_up import put_at_floor

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.report import ablation
from dbmtl.report.results_page import open_page
from dbmtl.report.runs import invented_run

NOTEBOOK = "15_paper/05_table5_ablation"
PERCENTS = {"STL": 0, "EW": -3, "loss-only": 1, "gradient-only": 2, "DB-MTL": 6}


@pytest.fixture(autouse=True)
def out(monkeypatch, tmp_path):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    yield
    plt.close("all")


def faked(method, seed, at_floor=()):
    percent = PERCENTS[method] + 0.1 * seed * (method == "DB-MTL")
    return put_at_floor(invented_run("toy", method, seed, percent), at_floor)


def page_of(*methods, at_floor=None):
    at_floor = at_floor or {}
    records = [faked(m, seed, at_floor.get(m, ())) for m in methods for seed in range(3)]
    return open_page(NOTEBOOK, "toy", records, only_made=True)


def test_ablation_tells_apart_what_differs_and_nothing_else():
    page = page_of(*PERCENTS)
    apart = ablation.told_apart(page)
    assert apart["both - neither"] and apart["loss only - neither"]
    assert set(apart) == set(ablation.DIFFERENCES)
    assert ablation.told_apart(page_of("STL", "EW")) == {}


def test_ablation_takes_common_tasks_where_one_is_at_its_floor():
    tasks = get_benchmark("toy").task_names
    page = page_of(*PERCENTS, at_floor={"loss-only": tasks[:1]})
    assert ablation.is_partial(page) and ablation.common_tasks(page) == tasks[1:]
    sample = ablation.common_sample(page, ablation.DIFFERENCES["both - neither"], "best")
    assert sample.tolist() == pytest.approx([9.0, 9.1, 9.2])
    assert set(ablation.told_apart(page)) == {
        "gradient only - neither",
        "both - gradient only",
        "both - neither",
    }
    rows = ablation.verdict_rows({"toy": page}, {"toy": "toy"})
    assert rows[0]["ours, common tasks"].mean == pytest.approx(4)
    panels = list(dict.fromkeys(ablation.forest_frame({"toy": page}, {"toy": "toy"})["panel"]))
    assert panels == [f"toy, {len(tasks) - 1} of {len(tasks)} tasks", "toy"]
    texts = [
        text.get_text()
        for text in ablation.forest_figure({"toy": page}, {"toy": "toy"}).axes[0].texts
    ]
    assert texts == ["not trained"] * 3


def test_ablation_without_runs_has_text_and_no_picture():
    pages = {"toy": open_page(NOTEBOOK, "toy", methods=list(ablation.CORNERS))}
    assert ablation.verdict_rows(pages, {"toy": "toy"}) == []
    assert ablation.forest_frame(pages, {"toy": "toy"}).empty
    assert ablation.task_frame(pages, {"toy": "toy"}).empty
    rows = ablation.corner_rows(pages, {"toy": "toy"})
    assert {row["toy"] for row in rows} == {"not run", "nothing printed"}

"""All tasks of all methods in one picture."""

import math

import matplotlib.pyplot as plt
import pytest

from dbmtl.report import task_levels
from dbmtl.report.results_page import open_page


@pytest.fixture
def page(monkeypatch, tmp_path):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    yield open_page("15_paper/03_table3_qm9", "qm9", paper="qm9", methods=["MGDA"])
    plt.close("all")


def test_levels_of_the_paper_are_factors_over_stl(page):
    frame = task_levels.level_frame(page, {})
    row = frame[(frame["method"] == "EW") & (frame["task"] == "R2")].iloc[0]
    stl = page.printed["STL"]["R2"]["MAE"]
    assert row["value"] == pytest.approx(math.log(stl / page.printed["EW"]["R2"]["MAE"]))
    assert "STL" not in set(frame["method"])


def test_levels_have_a_block_a_source_and_a_row_a_method(page):
    frame = task_levels.level_frame(page, {})
    fig = task_levels.levels_figure(page, frame)
    assert [ax.get_title() for ax in fig.axes] == ["paper", ""]
    columns = [tick.get_text() for tick in fig.axes[0].get_xticklabels()]
    assert columns == page.tasks
    assert len(fig.axes[0].get_yticklabels()) == frame["method"].nunique()


def test_levels_without_numbers_are_a_line_of_text(page, capsys):
    empty = open_page("15_paper/03_table3_qm9", "nyuv2-mmoe")
    task_levels.show_levels(empty, "levels", "MMoE")
    assert not plt.get_fignums()

"""Numbers as people read them, Markdown for a page, CSV for a program."""

import csv
import math
import re

import pandas as pd
import pytest

from dbmtl.experiments.intervals import Interval
from dbmtl.report.tables import as_frame, markdown_table, number, write_csv, write_table


@pytest.mark.parametrize(
    "value, text",
    [
        (None, "-"),
        (math.nan, "-"),
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
def test_numbers_as_people_read_them(value, text):
    assert number(value) == text


ROWS = [{"method": "a|b", "x": Interval(1.0, 0.5, 1.5, 3)}, {"method": "c\nd", "y": 2.0}]


def test_markdown_is_a_table_that_nothing_breaks():
    lines = markdown_table(ROWS, "Caption.").splitlines()
    cells = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines[:4]]
    assert cells[0] == ["method", "x", "y"]
    assert cells[2] == ["a\\|b", "1.00 ± 0.50", ""]
    assert cells[3] == ["c d", "", "2"]
    assert lines[4:] == ["", "Caption."]
    with pytest.raises(ValueError, match="rows is empty"):
        markdown_table([])


def test_numbers_in_words_are_not_read_as_numbers():
    assert "1e5" in markdown_table([{"name": "1e5", "count": 3}])
    assert "| 007" in markdown_table([{"name": "007"}])


def test_files_are_stable_and_hold_the_raw_numbers(tmp_path):
    first = [path.read_bytes() for path in write_table("t", ROWS, tmp_path, "Caption.")]
    assert first == [path.read_bytes() for path in write_table("t", ROWS, tmp_path, "Caption.")]
    with open(tmp_path / "t.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["x low"] == "0.5" and lines[0]["x seeds"] == "3"
    assert float(lines[1]["y"]) == 2 and lines[1]["x"] == ""
    assert [path.name for path in tmp_path.iterdir()] in (["t.md", "t.csv"], ["t.csv", "t.md"])


def test_csv_rounds_floats_and_joins_columns(tmp_path):
    rows = [{"a": 1 / 3, "b": "x"}, {"a": 123456789.0, "c": 2}, {"a": 1.8e-15, "b": None}]
    path = write_csv(rows, tmp_path / "new" / "rows.csv")
    assert path.read_text() == "a,b,c\n0.333333,x,\n1.23457e+08,,2\n0,,\n"


def test_what_differs_between_machines_is_not_written(tmp_path):
    other = 0.1 + 0.2
    texts = [write_csv([{"x": x}], tmp_path / "x.csv").read_text() for x in (0.3, other)]
    assert texts[0] == texts[1]


def test_frames_are_tables_too(tmp_path):
    frame = as_frame(ROWS)
    assert isinstance(frame, pd.DataFrame) and as_frame(frame) is frame
    assert markdown_table(frame) == markdown_table(ROWS)
    assert write_csv(frame, tmp_path / "a.csv").read_bytes() == (
        write_csv(ROWS, tmp_path / "b.csv").read_bytes()
    )
    numbers = pd.DataFrame({"x": [1.5, math.nan]})
    assert write_csv(numbers, tmp_path / "c.csv").read_text() == 'x\n1.5\n""\n'

"""Durations, bars and signals."""

import sys

import pytest

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.terminal import parse_duration
from dbmtl.experiments.train import train


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("90s", 90), ("25m", 1500), ("1h", 3600), ("1h2m3s", 3723), ("7", 7), (2.5, 2.5)],
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize(
    "text", ["", "m", "25 minutes", "-5s", "0", "1d", "1.2.3s", "s", "1h30", "2m5"]
)
def test_bad_durations(text):
    with pytest.raises(ValueError, match="like 90s, 25m or 1h30m"):
        parse_duration(text)


def test_a_bar_is_no_condition_of_a_run(tmp_path, monkeypatch):
    """tqdm is an extra: without it a run on a terminal goes on without a bar."""
    get_benchmark("toy")  # first, because torchmetrics may import tqdm for itself
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert train("toy", "EW", out=tmp_path, progress=True)["state"] == "finished"

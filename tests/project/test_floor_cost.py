"""What ci/benchmarks/floor_cost.py makes of its measurements."""

import importlib
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parents[2] / "ci" / "benchmarks"


@pytest.fixture
def script(monkeypatch):
    """ci/benchmarks/floor_cost.py as a module."""
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("floor_cost")


def measured(floor, step, equal):
    """Ten million numbers' worth of traffic at 50 GB/s, in milliseconds of the floor."""
    return {
        "median ms": {"floor": floor, "DB-MTL": step, "EW": equal},
        "bytes from memory": {"average and norms": 300_000_000, "weighted sum": 100_000_000},
        "copy, GB/s, median": 50.0,
    }


def test_the_least_ratio_is_the_traffic_at_the_speed_of_a_copy(script):
    # 400 MB at 50 GB/s are 8 ms
    assert script.least_ratio(measured(100.0, 120.0, 40.0), "median") == pytest.approx(1.08)


def test_the_words_for_readme_span_all_networks(script):
    places = {
        "wide MLP, T = 3": measured(100.0, 120.0, 40.0),
        "ResNet-18, T = 3": measured(100.0, 104.0, 26.0),
        "wide MLP, T = 11": measured(100.0, 110.0, 10.0),
    }
    assert script.in_words({"measured": places}) == (
        "in units of equal weighting's backward pass 3.0 to 4.0 at T = 3, 11.0 to 11.0 at T = 11"
    )


def test_the_bytes_of_a_sum_are_those_of_its_tensors(script):
    one = torch.zeros(5)
    other = torch.zeros(5)
    with script.Bytes() as counter:
        one.add_(other)
    assert counter.count == 3 * 5 * 4  # two operands, and the result

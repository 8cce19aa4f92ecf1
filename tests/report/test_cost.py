"""Costs of a step: ratios by round, words, and a measurement that is missing."""

import math
import statistics

import pytest

from dbmtl.experiments.intervals import Interval
from dbmtl.report import cost


@pytest.fixture(scope="module")
def record():
    return cost.read_costs()


@pytest.fixture(scope="module")
def printed():
    return cost.printed_costs()


def test_cost_of_a_step_is_the_sum_of_its_parts(record):
    steps = cost.step_times(record)
    for method, parts in record["ms"].items():
        totals = [sum(times) for times in zip(*parts.values(), strict=True)]
        assert steps[method].tolist() == pytest.approx(totals)


def test_cost_is_compared_round_by_round(record):
    steps = cost.step_times(record)
    others = ["UW", "DWA", "RLW"]
    ratios = []
    for row in steps.to_dict("records"):
        middle = statistics.median(row[method] for method in others)
        ratios.append(100 * (row["DB-MTL"] / middle - 1))
    measured = cost.more_than(steps, "DB-MTL", others)
    assert measured.mean == pytest.approx(statistics.mean(ratios))
    assert measured.count == len(ratios)
    assert cost.more_than(steps, "DB-MTL", ["not there"]) is None


@pytest.mark.parametrize(
    "low, high, word",
    [
        (-5, 5, "alike, within 10 %"),
        (11, 20, "not alike, beyond 10 %"),
        (-20, -11, "not alike, beyond 10 %"),
        (5, 15, "undecided"),
        (-math.inf, math.inf, "undecided"),
    ],
)
def test_cost_words_follow_the_whole_interval(low, high, word):
    assert cost.alike(Interval((low + high) / 2, low, high, 3)) == word


def test_cost_claim_has_the_paper_beside_it(record, printed):
    above, like, of_loss, place = cost.cost_claim(record, printed)
    gradient = [x for method, x in printed.items() if x > 1 and method != "DB-MTL"]
    assert above["paper"] == pytest.approx(100 * (printed["DB-MTL"] - 1), abs=0.05)
    expected = 100 * (printed["DB-MTL"] / statistics.median(gradient) - 1)
    assert like["paper"] == pytest.approx(expected, abs=0.05)
    assert of_loss["paper"] == 0 and place["paper"].endswith(f" of {len(gradient) + 1}")


def test_cost_without_a_measurement_says_not_run(printed, tmp_path):
    nothing = cost.read_costs(tmp_path / "none.json")
    assert {row["ours"] for row in cost.cost_claim(nothing, printed)} == {"not run"}
    assert {row["balancing, ms"] for row in cost.log_rows(nothing)} == {"not run"}
    assert {row["times EW"] for row in cost.cost_rows(nothing, printed)} == {"not run"}
    assert set(cost.cost_frame(nothing, printed)["source"]) == {"paper"}
    assert cost.costs_in_words(nothing) == "Ours: not run."

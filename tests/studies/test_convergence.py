"""The committed tables of the study of convergence: bounds, exponents, and what converges."""

import csv
import math
from pathlib import Path

import numpy as np
import pytest

STUDIES = Path(__file__).resolve().parents[2] / "figures" / "studies"
METHODS = [
    "EW",
    "loss only",
    "gradient only",
    "DB-MTL, β = 0",
    "DB-MTL, β = 0.5/√k",
    "DB-MTL, β = 0.9",
]
PROBLEMS = ["common", "zero", "triangle", "corner", "half", "noisy", "separable"]


def rows(stem):
    with open(STUDIES / f"convergence_{stem}.csv", newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def closest(problem, method, schedule="constant"):
    """{rate: closest distance}."""
    return {
        float(row["rate"]): float(row["closest"])
        for row in rows("levels")
        if (row["problem"], row["method"], row["schedule"]) == (problem, method, schedule)
    }


def test_every_method_ran_on_every_problem_with_both_schedules():
    runs = {(row["problem"], row["method"], row["schedule"]) for row in rows("levels")}
    assert runs == {
        (problem, method, schedule)
        for problem in PROBLEMS
        for method in METHODS
        for schedule in ("constant", "1/√k")
    }
    curves = {(row["problem"], row["method"]) for row in rows("distances")}
    assert curves == {(problem, method) for problem in PROBLEMS for method in METHODS}


def test_where_everything_converges():
    for problem in ("common", "triangle", "noisy"):
        for method in METHODS:
            assert min(closest(problem, method).values()) < 1e-4, (problem, method)
    assert all(max(closest("half", x).values()) < 1e-7 for x in METHODS if x != "loss only")


def test_bound_of_the_logarithm():
    """sqrt(T c rate), with the eigenvalues 0.5 and 2.5; the sum of logarithms: sqrt(rate)."""
    cosine = 2 * math.sqrt(0.5 * 2.5) / 3
    for rate, distance in closest("zero", "DB-MTL, β = 0").items():
        assert distance > 0.995 * math.sqrt(3 * cosine * rate)
    for rate, distance in closest("zero", "loss only").items():
        assert distance > 0.995 * math.sqrt(rate)


def test_bound_at_a_minimum():
    """At (0, 0) the gradients of the other two tasks have lengths 0.92 and 4 * 0.85, the losses
    are 1 + 0.85 / 2 and 4 + 4 * 0.73 / 2."""
    first = np.array([0.9, 0.2])
    third = np.array([-0.8, 0.3])
    lengths = [np.linalg.norm(x) for x in (first, third)]
    pull = 1 - np.linalg.norm(first / lengths[0] + third / lengths[1])
    alphas = {
        "gradient only": 4 * lengths[1],
        "DB-MTL, β = 0": max(x / (1 + x**2 / 2) for x in lengths),
    }
    for method, alpha in alphas.items():
        for rate, distance in closest("corner", method).items():
            assert 0.95 < distance / (rate * alpha * pull / 2) < 2


@pytest.mark.parametrize(
    "row", rows("exponents"), ids=lambda row: f"{row['problem']} {row['method']}"
)
def test_exponents_are_those_of_the_levels(row):
    distances = closest(row["problem"], row["method"])
    assert sorted(distances) == [0.001, 0.003, 0.01, 0.03, 0.1]
    logs = np.log(list(distances.items()))
    centered = logs - logs.mean(0)
    slope = (centered[:, 0] * centered[:, 1]).sum() / (centered[:, 0] ** 2).sum()
    assert abs(slope - float(row["exponent"])) < 0.006
    assert abs(slope - float(row["predicted"])) < 0.2

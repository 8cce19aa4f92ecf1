"""The committed QM9 table and figures are what the records say, recomputed here with NumPy."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.records import read_records

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures" / "paper"
RUNS = read_records(ROOT / "figures" / "runs", benchmark="qm9", scale="cpu")
RECORDS = [record for record in RUNS if not record["config"]["hyper"]]
METHODS = {
    "neither (EW)": "EW",
    "loss only": "loss-only",
    "gradient only": "gradient-only",
    "both (DB-MTL)": "DB-MTL",
}
TASKS = get_benchmark("qm9").task_names


def errors(method):
    """[seeds, tasks] test errors at the best validation epoch, seeds in order."""
    runs = sorted(
        (r for r in RECORDS if r["config"]["method"] == method), key=lambda r: r["config"]["seed"]
    )
    return np.array(
        [[r["selected"]["best validation epoch"]["test"][t]["MAE"] for t in TASKS] for r in runs]
    )


def rows(name):
    with open(FIGURES / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def trained(method):
    floor = np.array([RECORDS[0]["floors"]["test"][t]["MAE"] for t in TASKS])
    return (errors(method) < 0.95 * floor).all(0)


def gains(method):
    base = errors("STL")  # the run of the same seed
    return 100 * (base - errors(method)) / base


def test_qm9_records_are_complete_and_finished():
    found = {
        (r["config"]["method"], r["config"]["seed"]) for r in RECORDS if r["state"] == "finished"
    }
    assert found >= {(method, seed) for method in ["STL", *METHODS.values()] for seed in (0, 1, 2)}
    assert len({json.dumps(r["config"]["scale"]) + r["data"]["hash"] for r in RECORDS}) == 1


@pytest.mark.parametrize("method", METHODS.values())
def test_qm9_floors_are_the_training_mean(method):
    """A record's floor is the mean absolute deviation of test targets from the training mean."""
    benchmark = get_benchmark("qm9")
    data = benchmark.load(benchmark.scale("cpu"), "cpu", 0)
    z, unit = (data.test.targets["mu"][:, k].numpy() for k in (0, 1))
    center = data.train.targets["mu"][:, 0].numpy().mean()
    record = next(r for r in RECORDS if r["config"]["method"] == method)
    assert record["floors"]["test"]["mu"]["MAE"] == pytest.approx(
        np.abs((z - center) * unit).mean(), rel=1e-4
    )


@pytest.mark.parametrize("name, method", METHODS.items())
def test_qm9_table5_delta_p_follows_from_the_records(name, method):
    row = next(
        row
        for row in rows("table5.csv")
        if (row["corner"], row["source"]) == (name, "ours, best epoch")
    )
    if not (trained(method) & trained("STL")).all():
        assert row["QM9"].startswith("not trained")
        return
    assert float(row["QM9"]) == pytest.approx(gains(method).mean(1).mean(), abs=1e-3)
    spread = 4.302653 * gains(method).mean(1).std(ddof=1) / np.sqrt(3)
    assert float(row["QM9 high"]) - float(row["QM9"]) == pytest.approx(spread, rel=1e-3)


def test_qm9_table3_holds_our_errors():
    ours = {row["method"]: row for row in rows("table3.csv") if row["source"] == "ours"}
    for name, method in {
        "STL": "STL",
        "EW": "EW",
        "DB-MTL": "DB-MTL",
        "loss only": "loss-only",
    }.items():
        assert [float(ours[name][t]) for t in TASKS] == pytest.approx(
            errors(method).mean(0).tolist(), rel=1e-4
        )


def test_qm9_picture_of_all_tasks_holds_the_records():
    shown = {
        (row["task"], row["method"]): float(row["value"])
        for row in rows("table3_tasks.csv")
        if row["source"] == "ours, cpu"
    }
    for method in METHODS.values():
        logs = np.log(errors("STL") / errors(method)).mean(0)
        usable = trained(method) & trained("STL")
        for k, task in enumerate(TASKS):
            assert ((task, method) in shown) == usable[k]
            if usable[k]:
                assert shown[task, method] == pytest.approx(logs[k], rel=1e-4, abs=1e-5)


def test_qm9_picture_of_all_tasks_holds_the_paper():
    shown = [row for row in rows("table3_tasks.csv") if row["source"] == "paper"]
    assert len({row["method"] for row in shown}) == 21 and len(shown) == 21 * len(TASKS)

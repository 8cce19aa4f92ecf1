"""The committed QM9 table and figures are what the records say, recomputed here with NumPy."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from dbmtl.benchmarks.base import get_benchmark

FIGURES = Path(__file__).resolve().parents[2] / "figures"
FILES = [json.loads(path.read_text()) for path in sorted((FIGURES / "runs").glob("qm9-cpu-*.json"))]
RECORDS = [record for record in FILES if not record["config"]["hyper"]]
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
    row = next(row for row in rows("table5_qm9.csv") if row["quantity"] == name)
    if not (trained(method) & trained("STL")).all():
        assert row["ours"].startswith("not trained")
        return
    assert float(row["ours"]) == pytest.approx(gains(method).mean(1).mean(), abs=1e-3)
    spread = 4.302653 * gains(method).mean(1).std(ddof=1) / np.sqrt(3)
    assert float(row["ours high"]) - float(row["ours"]) == pytest.approx(spread, rel=1e-3)


def test_qm9_table5_common_tasks_follow_from_the_records():
    """The column stands only where a corner has no delta_p."""
    common = np.all([trained(m) for m in [*METHODS.values(), "STL"]], axis=0)
    column = f"ours, {common.sum()} tasks"
    assert (column in rows("table5_qm9.csv")[0]) == (not common.all())
    column = column if not common.all() else "ours"
    mean = {name: gains(method)[:, common].mean(1) for name, method in METHODS.items()}
    both, loss, gradient, neither = (
        mean[n] for n in ("both (DB-MTL)", "loss only", "gradient only", "neither (EW)")
    )
    found = {row["quantity"]: row[column] for row in rows("table5_qm9.csv")}
    assert float(found["both - neither"]) == pytest.approx((both - neither).mean(), abs=1e-3)
    assert float(found["interaction"]) == pytest.approx(
        (both - loss - gradient + neither).mean(), abs=1e-3
    )


def test_qm9_table3_holds_our_errors():
    ours = {row["method"]: row for row in rows("table3_qm9.csv") if row["source"] == "ours"}
    for name, method in {
        "STL": "STL",
        "EW": "EW",
        "DB-MTL": "DB-MTL",
        "loss only": "loss-only",
    }.items():
        assert [float(ours[name][t]) for t in TASKS] == pytest.approx(
            errors(method).mean(0).tolist(), rel=1e-4
        )


def test_qm9_figure_numbers_are_the_records():
    shown = {
        (r["task"], r["method"], r["seed"]): float(r["percent"]) for r in rows("qm9_per_task.csv")
    }
    for method in METHODS.values():
        usable = trained(method) & trained("STL")
        for k in np.flatnonzero(usable):
            for seed in range(3):
                assert shown[TASKS[k], method, str(seed)] == pytest.approx(
                    gains(method)[seed, k], abs=1e-2
                )
        assert (("delta_p", method, "0") in shown) == usable.all()
    assert sum(seed == "paper" for _, _, seed in shown) == len(METHODS)

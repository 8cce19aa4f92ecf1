"""Early training of every method on QM9: scale, notebook on fresh runs, committed numbers."""

import csv
import json
import os
import shlex
import subprocess
from pathlib import Path

import numpy as np
import pytest

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.records import read_records
from dbmtl.registry import method_names

ROOT = Path(__file__).resolve().parents[2]
FIGURES = ROOT / "figures"
FILES = read_records(FIGURES / "runs", benchmark="qm9", scale="early", seed=0)
NAMES = {"STL", *method_names()}  # not those with the logarithm in front, nor those with settings
RECORDS = [r for r in FILES if r["config"]["method"] in NAMES and not r["config"]["hyper"]]
TASKS = get_benchmark("qm9").task_names


def rows(folder, pattern):
    found = []
    for path in sorted(folder.glob(pattern)):
        with open(path, newline="", encoding="utf-8") as file:
            found += list(csv.DictReader(file))
    return found


def numbers(table, method):
    return np.array([[float(row[t]) for t in TASKS] for row in table if row["method"] == method])


def losses_of(record):
    return np.array([record["curves"]["train"][t] for t in TASKS]).T


def factors_of(record):
    """T c / sum |c| with c = slope times weight, [monitored steps, tasks]."""
    slopes, weights = (
        np.array([record["monitors"][kind][t] for t in TASKS]) for kind in ("slopes", "weights")
    )
    return (len(TASKS) * slopes * weights / np.abs(slopes * weights).sum(0)).T


def check_numbers(records, folder):
    """The files beside the pictures say what the records say."""
    losses = rows(folder / "studies", "early_training.csv")
    weights = rows(folder / "studies", "early_weights.csv")
    for record in records:
        method = record["config"]["method"]
        if record["curves"]["epochs"]:
            np.testing.assert_allclose(numbers(losses, method), losses_of(record), rtol=1e-5)
        if "weights" in record["monitors"] and record["state"] == "finished":
            np.testing.assert_allclose(numbers(weights, method), factors_of(record), rtol=1e-5)
        else:
            assert record["state"] != "finished" or len(numbers(weights, method)) == 0


def test_qm9_early_scale_is_past_the_warm_ups():
    scale = get_benchmark("qm9").scale("early")
    assert (scale.train_size, scale.batch_size, scale.width) == (500, 16, 32)
    assert (
        scale.epochs > 6
    )  # IGBv2 draws its weights at random for five epochs, STCH warms up for four
    assert scale.epochs * -(-scale.train_size // scale.batch_size) >= 300


@pytest.fixture(scope="module")
def smoke(tmp_path_factory, warm_python):
    """The notebook on runs of its own."""
    out = tmp_path_factory.mktemp("early")
    command = [
        *warm_python,
        ROOT / "ci" / "run_notebooks.py",
        "--only",
        "16_studies/04_early_training",
        "-p",
        "seed",
        "3",
    ]
    command += ["-p", "methods", "EW,DWA,PCGrad,DB-MTL,GradDrop"]
    env = {
        **os.environ,
        "DBMTL_OUT": str(out),
        "OMP_NUM_THREADS": "1",
        "DBMTL_KERNEL_PYTHON": shlex.join(warm_python),
    }
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return out / "out" / "smoke"


@pytest.mark.full
def test_early_training_takes_steps_and_draws_its_own_records(smoke):
    records = {
        r["config"]["method"]: r
        for r in (json.loads(p.read_text()) for p in smoke.glob("runs/*/*.json"))
    }
    assert set(records) == {"EW", "DWA", "PCGrad", "DB-MTL", "GradDrop"}
    assert all(r["step"] == 6 and r["config"]["seed"] == 3 for r in records.values())
    check_numbers(records.values(), smoke / "figures")
    weights = rows(smoke / "figures" / "studies", "early_weights.csv")
    assert np.all(numbers(weights, "EW") == 1) and len(numbers(weights, "DB-MTL")) == 6
    assert numbers(weights, "DB-MTL").std() > 0.1 and len(numbers(weights, "GradDrop")) == 0


@pytest.mark.full
def test_early_training_says_what_it_is_and_ranks_nothing(smoke):
    text = (smoke / "figures" / "studies" / "early_training_numbers.md").read_text()
    lines = [
        line.split(" | ")[0].strip("| ") for line in text.splitlines() if line.startswith("| ")
    ]
    assert lines == ["method", "EW", "DWA", "PCGrad", "GradDrop", "DB-MTL"]  # the registry's order
    for words in (
        "Early training, one seed (3)",
        "smoke scale, 6 steps",
        "cpu: ",
        "no ranking",
    ):
        assert words in text
    assert not {"mean rank", "best method", "winner", "delta_p"} & {
        word for word in text.lower().split("|")
    }


def test_committed_early_training_is_of_every_method_and_of_the_records():
    assert len(rows(FIGURES / "studies", "early_training_numbers.csv")) == len(RECORDS)
    if RECORDS:
        methods = {r["config"]["method"] for r in RECORDS}
        not_run = NAMES - methods
        assert not_run <= {"LS", "UW-SO"}  # added after this training
    assert len({json.dumps(r["config"]["scale"]) + r["data"]["hash"] for r in RECORDS}) <= 1
    check_numbers(RECORDS, FIGURES)

"""What batch norm does to several domains: functions, committed numbers and the picture."""

import csv
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import matplotlib
import nbformat
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.benchmarks.base import TensorSplit, get_benchmark
from dbmtl.benchmarks.office import OfficeNet
from dbmtl.report import batch_norm
from dbmtl.report.style import save_figure, use_style
from dbmtl.report.tables import write_csv

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
NAME = "16_studies/01_batch_norm"
NOTEBOOK = ROOT / "nbs" / f"{NAME}.ipynb"
COMMITTED = ROOT / "figures/studies/batch_norm.csv"
COLUMNS = [
    *("benchmark", "scale", "method", "seed", "data", "code"),
    *("domain", "selection", "epoch", "statistics", "accuracy", "shift", "stretch"),
]


@pytest.fixture(scope="module")
def page():
    """The library's functions, and the demonstration of the notebook; nothing is trained."""
    names = dict(vars(batch_norm))
    for cell in nbformat.read(NOTEBOOK, 4).cells:
        if cell.cell_type == "code" and "nn.BatchNorm1d(" in cell.source:
            names |= {"assert_close": assert_close, "math": math}
            exec(compile(cell.source, NOTEBOOK.name, "exec"), names)
    return names


def rows_of(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_batch_norm_by_hand(page):
    """0 and 2, then 8 and 12: what a running mean of 5.5 and variance of 5 make of them."""
    values = [(v - 5.5) / math.sqrt(5) for v in (0, 2, 8, 12)]
    assert_close(torch.cat(page["in_evaluation"]).flatten(), torch.tensor(values))
    assert [int((x > 0).sum()) for x in page["in_training"]] == [1, 1]
    assert [int((x > 0).sum()) for x in page["in_evaluation"]] == [0, 2]
    unit = nn.BatchNorm1d(1, eps=1e-12, momentum=0.1, affine=False)
    for _ in range(200):
        for x in page["two_domains"]:
            unit(x)
    assert_close(
        torch.cat([unit.running_mean, unit.running_var]), torch.tensor([109 / 19, 98 / 19])
    )


def test_batch_norm_shares_of_the_running_mean_are_those_of_the_formula():
    m, means = 0.1, [3.0, -1.0, 7.0, 2.0]
    unit = nn.BatchNorm1d(1, momentum=m)
    for _ in range(100):
        for mean in means:
            unit(torch.tensor([[mean - 1], [mean + 1]]))
    shares = [m * (1 - m) ** (4 - d) / (1 - (1 - m) ** 4) for d in (1, 2, 3, 4)]
    assert math.isclose(sum(shares), 1)
    assert_close(
        unit.running_mean,
        torch.tensor([sum(p * mean for p, mean in zip(shares, means, strict=True))]),
    )
    assert_close(
        unit.running_var, torch.tensor([2.0])
    )  # and nothing of the spread of the means, which is 7.6


def network_and_split():
    torch.manual_seed(0)
    network = OfficeNet(["a", "b"], 3, "lite0-frozen", width=4).train()
    split = TensorSplit(torch.randn(24, 1280) + 1, {"a": torch.zeros(24, dtype=torch.long)})
    for inputs in torch.randn(6, 16, 1280) * 3 - 2:
        network(inputs, "b")
    return network, split


def test_batch_norm_own_statistics_are_of_the_split_and_leave_the_network_alone(page):
    network, split = network_and_split()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    own = page["own_statistics"](network, "a", split, 8)
    assert network.training and not any(layer.training for layer in own.modules())
    assert torch.equal(torch.get_rng_state(), state)  # no dropout was drawn
    for name, value in network.state_dict().items():
        assert torch.equal(value, before[name]), name
        assert (
            "running" in name or "tracked" in name or torch.equal(own.state_dict()[name], value)
        ), name
    outputs, norm = network.trunk.block[0](split.inputs).detach(), own.trunk.block[1]
    assert_close(norm.running_mean, outputs.mean(0))  # three batches of eight, each counts the same
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0)).view(3, 8)
    assert_close(norm.running_var, outputs[order].var(1).mean(0))
    x = own(split.inputs, "a").detach()
    by_hand = nn.functional.batch_norm(
        outputs, norm.running_mean, norm.running_var, norm.weight, norm.bias
    )
    assert_close(x, network.heads["a"](by_hand.relu()).detach())


def test_batch_norm_shift_and_stretch(page):
    network, split = network_and_split()
    own = page["own_statistics"](network, "a", split, 8)
    assert page["shift_and_stretch"](own, own) == (0.0, 1.0)
    used, norm = network.trunk.block[1], own.trunk.block[1]
    norm.running_mean.copy_(used.running_mean + 3 * used.running_var.sqrt())
    norm.running_var.copy_(4 * used.running_var)
    assert_close(torch.tensor(page["shift_and_stretch"](network, own)), torch.tensor([3.0, 2.0]))


def test_batch_norm_delta_p_is_against_stl_of_the_same_seed(page):
    accuracies = {
        ("STL", 0): (80.0, 50.0),
        ("STL", 1): (90.0, 40.0),
        ("EW", 0): (80.0, 50.0),
        ("EW", 1): (99.0, 40.0),
    }
    line = {"benchmark": "x", "selection": "best", "epoch": 1, "shift": 0, "stretch": 1}
    rows = [
        line
        | {"method": method, "seed": seed, "domain": domain}
        | {"statistics": "mixed", "accuracy": accuracy}
        for (method, seed), values in accuracies.items()
        for domain, accuracy in zip("ab", values, strict=True)
    ]
    found = page["gain_frame"](page["accuracy_frame"](rows))
    assert found["gain"].tolist() == [0.0, pytest.approx(5.0)]


# -------------------------------------------------------------------------------- committed numbers


def test_batch_norm_committed_numbers_are_complete():
    table = rows_of(COMMITTED)
    assert list(table[0]) == COLUMNS and all(value != "" for row in table for value in row.values())
    key = ("benchmark", "method", "seed", "domain", "selection", "statistics")
    found = {tuple(row[name] for name in key): row for row in table}
    assert len(found) == len(table) and {row["scale"] for row in table} == {"cpu"}
    for name in ("office31", "pacs"):
        domains = get_benchmark(name).task_names
        sets = (["STL", "EW", "DB-MTL"], "012", domains, ["best", "last"], ["mixed", "own"])
        assert {k[1:] for k in found if k[0] == name} == set(itertools.product(*sets))
        assert len({row["data"] for row in table if row["benchmark"] == name}) == 1
    for row in table:
        other = found[*(row[name] for name in key[:-1]), "own"]
        assert other["epoch"] == row["epoch"] and (
            row["selection"] == "best" or row["epoch"] == "30"
        )
        assert 50 < float(row["accuracy"]) <= 100
        assert (row["statistics"] == "own") == (row["shift"] == "0" and row["stretch"] == "1")


@pytest.mark.parametrize("selection", ["best", "last"])
def test_batch_norm_committed_numbers_show_what_the_page_says(page, selection):
    frame = page["accuracy_frame"](rows_of(COMMITTED))
    for row in page["domain_table"](frame, selection).to_dict("records"):
        gained = row["own"] - row["mixed"]
        if row["method"] != "STL" and row["domain"] == "sketch":
            assert gained > 4 and row["shift"] > 0.4 and row["stretch"] < 0.7
        elif row["method"] == "STL" or row["benchmark"] == "office31":
            assert abs(gained) < 0.6 and row["shift"] < 0.2
    gains = page["gain_frame"](frame)
    of_pacs = gains[(gains["benchmark"] == "pacs") & (gains["selection"] == selection)]
    means = of_pacs.groupby(["statistics", "method"])["gain"].mean()
    assert means["mixed"].between(-6, -1).all() and means["own"].between(-0.5, 0.5).all()


def test_batch_norm_picture_is_drawn_from_the_committed_numbers_alone(page, tmp_path):
    """At smoke scale, in a folder of its own, from numbers that nobody measured."""
    table = [row for row in rows_of(COMMITTED) if row["benchmark"] == "pacs"]
    for row in table:
        row["accuracy"] = f"{float(row['accuracy']) - 1:.6g}"
    with matplotlib.rc_context():
        use_style()
        path = write_csv(table, tmp_path / "figures" / "studies" / "batch_norm.csv")
        frame = page["accuracy_frame"](page["read_rows"](path))
        wanted = save_figure(page["both_ways_figure"](frame), "wanted", tmp_path)
        page["plt"].close("all")
    before = path.read_bytes()
    command = [sys.executable, ROOT / "ci" / "run_notebooks.py", "--only", NAME]
    env = {**os.environ, "DBMTL_OUT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=180, stdin=subprocess.DEVNULL
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert path.read_bytes() == before
    for file in wanted:
        drawn = (tmp_path / "figures" / "studies" / f"batch_norm{file.suffix}").read_bytes()
        assert drawn == file.read_bytes()
        assert drawn != (ROOT / "figures" / "studies" / f"batch_norm{file.suffix}").read_bytes()
        assert (
            tmp_path / "out" / "smoke" / "figures" / "studies" / f"batch_norm{file.suffix}"
        ).exists()
    own = rows_of(tmp_path / "out" / "smoke" / "figures" / "studies" / "batch_norm.csv")
    assert list(own[0]) == COLUMNS and {row["scale"] for row in own} == {"smoke"}

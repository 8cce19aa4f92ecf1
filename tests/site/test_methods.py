"""The tables of methods say what the code does; the toy problem's numbers can be had again."""

import ast
import csv
import json
import re
from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from dbmtl.profile import anatomy
from dbmtl.registry import hyperparameters, make_balancer, method_facts, method_names

FIGURES = Path(__file__).resolve().parents[2] / "figures"


def rows(stem):
    """The cells of a Markdown table, without its header."""
    lines = (FIGURES / "site" / f"{stem}.md").read_text(encoding="utf-8").splitlines()
    return [
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in lines
        if line.startswith("| `")
    ]


METHODS = {row[0].strip("` "): row for row in rows("methods")}


def test_the_table_of_methods_is_complete_and_in_order():
    assert list(METHODS) == method_names()


@pytest.mark.full
@pytest.mark.parametrize("name", method_names())
def test_the_table_of_methods_is_what_is_counted(name):
    _, _, _, passes, heads, state, may_miss, _ = METHODS[name]
    few, many = (anatomy(lambda **options: make_balancer(name, **options), T) for T in (3, 5))
    assert heads == few.heads == many.heads
    assert state.endswith(f"({few.state:,})")
    assert {"yes": True, "no": False}[may_miss] == few.may_miss == many.may_miss
    formula = {"1": lambda T: 1, "T": lambda T: T, "3T": lambda T: 3 * T}[passes]
    assert (few.passes, many.passes) == (formula(3), formula(5))


def test_the_table_of_defaults_is_what_the_signatures_say():
    table = {}
    for name, key, default, *_ in rows("defaults"):
        table.setdefault(name.strip("` "), {})[key.strip("`")] = ast.literal_eval(
            default.strip("`")
        )
    known = {name: hyperparameters(name) for name in method_names()}
    for values in known.values():
        values.pop("seed", None)
    assert table == json.loads(
        json.dumps({name: values for name, values in known.items() if values})
    )


@pytest.mark.parametrize("name", method_names())
def test_facts_are_complete(name):
    facts = method_facts(name)
    assert all(facts[key] for key in ("venue", "axis", "equation", "touches", "state", "passes"))
    assert all(row["source"] and row["original"] for row in facts["hyper"])
    listed = [note for method, note in rows("differences") if method.strip("` ") == name]
    assert listed == facts["differences"]


@pytest.mark.parametrize("name", method_names())
def test_facts_have_their_mathematics_in_dollars_and_their_code_in_backticks(name):
    for note in method_facts(name)["differences"]:
        assert note.count("$") % 2 == note.count("`") % 2 == 0, note
        plain = re.sub(r"`[^`]*`|\$[^$]*\$", "", note)
        assert re.findall(r"\S*(?:[=<>^_\\]|\de-\d)\S*", plain) == [], note
        # Markdown takes the backslash of a punctuation mark away before MathJax sees it
        assert re.findall(r"\\[^A-Za-z]", note) == [], note
        assert "|" not in note, note  # it would end the cell


# ---------------------------------------------------------------------------------- the toy problem


def toy(theta):
    """The two losses, written down a second time."""
    x, y = theta
    c1 = torch.relu(torch.tanh(y / 2))
    c2 = torch.relu(torch.tanh(-y / 2))
    f1 = torch.log(torch.clamp(abs((-x - 7) / 2 - torch.tanh(-y)), min=5e-6)) + 6
    f2 = torch.log(torch.clamp(abs((-x + 3) / 2 - torch.tanh(-y) + 2), min=5e-6)) + 6
    g1 = ((-x + 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    g2 = ((-x - 7) ** 2 + 0.1 * (-y - 8) ** 2) / 10 - 20
    return 0.1 * (c1 * f1 + c2 * g1 + 22), c1 * f2 + c2 * g2 + 22


def table():
    with open(FIGURES / "studies" / "toy_problem.csv", encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def test_toy_problem_shows_every_method_on_parameters_from_five_starts():
    shown = {}
    for row in table():
        shown.setdefault(row["method"], set()).add(row["start"])
    features = {"MGDA-UB", "IMTL-G-features", "GradDrop-features"}
    assert set(method_names()) - features - set(shown) == {"loss-only", "gradient-only"}
    assert all(len(starts) == 5 for starts in shown.values())
    assert "CAGrad+log" in shown and "EW+log" in shown


@pytest.mark.full
@pytest.mark.parametrize(
    "name, objective",
    [
        ("EW", lambda losses: losses[0] + losses[1]),
        ("EW+log", lambda losses: (losses[0] + 1e-8).log() + (losses[1] + 1e-8).log()),
        ("GLS", lambda losses: (losses[0] * losses[1]).sqrt()),
    ],
)
def test_toy_problem_without_a_balancer(name, objective):
    """Losses along a run in the committed table, by plain `backward`."""
    told = {int(r["step"]): r for r in table() if r["method"] == name and r["start"] == "1"}
    theta = torch.tensor([-8.5, -5.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([theta], lr=0.02)
    for step in range(max(told) + 1):
        losses = toy(theta)
        if step in told:
            row = torch.tensor(
                [float(told[step]["loss 1"]), float(told[step]["loss 2"])], dtype=torch.float64
            )
            assert_close(torch.stack(losses).detach(), row, rtol=0, atol=6e-4)
        optimizer.zero_grad()
        objective(losses).backward()
        optimizer.step()

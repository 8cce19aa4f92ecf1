"""One thought a statement: what neither ruff nor its formatter forbids."""

import ast
import functools
import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PATTERNS = ["ci/**/*.py", "nbs/**/*.ipynb", "tests/**/*.py"]


def files():
    """The scripts and notebooks that are checked."""
    for pattern in PATTERNS:
        for path in sorted(ROOT.glob(pattern)):
            if ".ipynb_checkpoints" not in path.parts:
                yield path


@functools.cache
def trees(path):
    """A script, or the code cells of a notebook, parsed."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".py":
        return [ast.parse(text)]
    cells = [cell for cell in json.loads(text)["cells"] if cell["cell_type"] == "code"]
    return [ast.parse("".join(cell["source"])) for cell in cells]


def calls(node):
    return any(isinstance(part, ast.Call) for part in ast.walk(node))


def packed_assignments(tree):
    """`a, b = f(x), g(y)` is two statements on one line."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            into_names = any(isinstance(target, ast.Tuple) for target in node.targets)
            if into_names and sum(map(calls, node.value.elts)) > 1:
                yield ast.unparse(node)


def nested_conditionals(tree):
    """`a if x else b if y else c` is an if statement, a table, or a function with its own name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.IfExp):
            parts = (node.body, node.test, node.orelse)
            if any(isinstance(inner, ast.IfExp) for part in parts for inner in ast.walk(part)):
                yield ast.unparse(node)


@pytest.mark.parametrize("rule", [packed_assignments, nested_conditionals])
@pytest.mark.parametrize("path", list(files()), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_one_thought_a_statement(rule, path):
    assert [line for tree in trees(path) for line in rule(tree)] == []


@pytest.mark.parametrize(
    "line",
    [
        "a, b = f(x), g(y)",
        "a, b = f(x), [g(y) for y in z]",
        "self.a, (b, c) = f(x), g(y)",
        "a, b, c = 1, f(x) + 1, g(y)",
    ],
)
def test_packed_assignments_are_found(line):
    assert list(packed_assignments(ast.parse(line))) != []


@pytest.mark.parametrize("line", ["a, b = b, a", "a, b = f(x)", "a, b = 0, f(x)", "a = f(x), g(y)"])
def test_plain_assignments_are_not_packed(line):
    assert list(packed_assignments(ast.parse(line))) == []


@pytest.mark.parametrize(
    "line, number",
    [
        ("a if x else b if y else c", 1),
        ("a if x else f(b if y else c)", 1),
        ("(a if x else b) + (c if y else d)", 0),
        ("a if x else b", 0),
    ],
)
def test_nested_conditionals_are_found(line, number):
    assert len(list(nested_conditionals(ast.parse(line)))) == number

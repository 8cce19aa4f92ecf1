"""Every notebook runs once, by papermill in a process of its own: that is its test."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import papermill
import pytest

ROOT = Path(__file__).resolve().parents[2]
NOTEBOOKS = sorted(
    path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
    for path in ROOT.glob("nbs/**/*.ipynb")
)
LIMIT = 180  # seconds


def tagged_cells(path):
    """The cells of parameters of a notebook."""
    cells = nbformat.read(path, 4).cells
    return [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]


def reproduce(*args, out, root=ROOT):
    """The command without its set-up, with a folder of its own for all that it writes."""
    command = [sys.executable, root / "ci" / "run_notebooks.py", *args]
    env = {**os.environ, "DBMTL_OUT": str(out), "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        command, env=env, capture_output=True, text=True, timeout=LIMIT, stdin=subprocess.DEVNULL
    )


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, tmp_path):
    """From no records at all; a notebook that asks for runs must have taken steps, and recorded it."""
    done = reproduce("--only", name, out=tmp_path)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    assert (tmp_path / "out" / "notebooks" / f"{name}.ipynb").exists()
    notebook = ROOT / "nbs" / f"{name}.ipynb"
    asks = re.search(r"\b(run_all|ask)\(", notebook.read_text(encoding="utf-8"))
    if asks and "scale" in papermill.inspect_notebook(notebook):
        records = [json.loads(path.read_text()) for path in tmp_path.glob("out/smoke/runs/*.json")]
        assert any(record["step"] > 0 for record in records)


@pytest.mark.parametrize(
    "name", [name for name in NOTEBOOKS if tagged_cells(ROOT / "nbs" / f"{name}.ipynb")]
)
def test_every_parameter_of_a_notebook_can_be_set(name):
    """papermill reads the cell line by line and leaves out what it cannot parse: quotes in a comment, for one."""
    path = ROOT / "nbs" / f"{name}.ipynb"
    names = {
        target.id
        for cell in tagged_cells(path)
        for line in ast.parse(cell.source).body
        for target in line.targets
    }
    assert set(papermill.inspect_notebook(path)) == names


@pytest.fixture
def project(tmp_path):
    """A small project with the real runner: one notebook that works, one with a parameter that fails on request."""
    root = tmp_path / "project"
    (root / "nbs").mkdir(parents=True)
    shutil.copytree(ROOT / "ci", root / "ci")
    kernel = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
    draw = "from pathlib import Path\nPath('../figures').mkdir(exist_ok=True)\nPath('../figures/plot.png').touch()"
    cells = {
        "00_first": ["1 + 1"],
        "41_second": [
            "scale = 'smoke'  # size\nseeds = [0]  # which",
            "assert scale != 'cpu', seeds",
            draw,
        ],
    }
    for name, sources in cells.items():
        code = [nbformat.v4.new_code_cell(text) for text in sources]
        notebook = nbformat.v4.new_notebook(cells=code, metadata=kernel)
        if len(sources) > 1:
            notebook.cells[0].metadata.tags = ["parameters"]
        nbformat.write(notebook, root / "nbs" / f"{name}.ipynb")
    return root


def test_reproduce_runs_in_order_and_sums_up(project):
    done = reproduce(root=project, out=project)
    lines = [line.split() for line in done.stdout.splitlines()]
    assert done.returncode == 0, done.stderr
    table = lines[lines.index(["notebook", "seconds", "figures"]) + 1 :]
    assert [line[0] for line in table[:2]] == ["00_first", "41_second"]
    assert table[1][2] == "plot" and len(table[0]) == 2
    assert sorted(path.name for path in project.glob("out/notebooks/*")) == [
        "00_first.ipynb",
        "41_second.ipynb",
    ]


def test_reproduce_stops_at_a_failed_cell_and_names_it(project):
    done = reproduce("--scale", "cpu", "-p", "seeds", "[1, 2]", root=project, out=project)
    assert done.returncode == 1
    assert (
        "41_second.ipynb, cell 2 (assert scale != 'cpu', seeds): AssertionError: [1, 2]"
        in done.stderr
    )
    assert "FAILED" in done.stdout


@pytest.mark.parametrize(
    "args, message",
    [
        (
            ["-p", "seed", "3"],
            "parameter 'seed': no selected notebook declares it; did you mean 'seeds'?",
        ),
        (
            ["--only", "first", "--scale", "cpu"],
            "parameter 'scale': no selected notebook declares it",
        ),
        (["--scale", "papr"], "--scale papr: unknown; did you mean 'paper'?"),
        (["--only", "secand"], "--only secand: no notebook of that name"),
    ],
)
def test_reproduce_refuses_what_no_notebook_knows(project, args, message):
    done = reproduce(*args, root=project, out=project)
    assert done.returncode == 1 and message in done.stderr
    assert not (project / "out").exists()


def test_reproduce_runs_the_kernel_of_its_own_environment(project, tmp_path):
    """Even where another kernel named python3 comes first on Jupyter's path."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    spec.joinpath("kernel.json").write_text(
        json.dumps(
            {
                "argv": ["/bin/false", "{connection_file}"],
                "display_name": "python3",
                "language": "python",
            }
        )
    )
    command = [sys.executable, project / "ci" / "run_notebooks.py", "--only", "first"]
    env = {**os.environ, "JUPYTER_PATH": str(tmp_path / "jupyter"), "DBMTL_OUT": str(project)}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr

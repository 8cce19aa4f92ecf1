"""Every notebook runs once, by papermill in a process of its own: that is its test.

The processes are forks of one that has imported torch and the like (`warm_python`); the tests of
the runner itself start as a user does.
"""

import ast
import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import nbformat
import papermill
import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
LIMIT = 180  # seconds
KERNEL = {"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}}
LIBRARY = ("01_", "02_", "03_", "04_", "05_", "06_")
NUMBER = re.compile(r"-?\d+\.?\d*(?:e[-+]?\d+)?")


def path_of(name):
    return ROOT / "nbs" / f"{name}.ipynb"


def parameter_cells(name):
    cells = nbformat.read(path_of(name), 4).cells
    return [cell for cell in cells if "parameters" in cell.metadata.get("tags", [])]


NOTEBOOKS = sorted(
    path.relative_to(ROOT / "nbs").with_suffix("").as_posix()
    for path in ROOT.glob("nbs/**/*.ipynb")
    if ".ipynb_checkpoints" not in path.parts
)
WITH_PARAMETERS = [name for name in NOTEBOOKS if parameter_cells(name)]


def reproduce(*args, out, root=ROOT, python=(sys.executable,), **environment):
    """The command without its set-up, with a folder of its own for all that it writes."""
    return subprocess.run(
        [*python, root / "ci" / "run_notebooks.py", *args],
        env=os.environ | {"DBMTL_OUT": str(out), "OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=LIMIT,
        stdin=subprocess.DEVNULL,
    )


def texts_displayed(path):
    """What the code cells of a notebook show in words, a text for each."""
    texts = []
    for cell in nbformat.read(path, 4).cells:
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", []):
            shown = [
                each.get("text") or each.get("data", {}).get("text/plain", "")
                for each in cell.outputs
            ]
            texts.append("\n".join(text.strip() for text in shown))
    return texts


def same_up_to_rounding(text, other):
    """Do two texts differ in the last digits of their numbers at most?"""
    if NUMBER.sub("#", text) != NUMBER.sub("#", other):
        return False
    pairs = zip(NUMBER.findall(text), NUMBER.findall(other), strict=True)
    return all(float(a) == pytest.approx(float(b), rel=1e-2, abs=1e-4) for a, b in pairs)


def test_texts_are_compared_up_to_rounding():
    assert same_up_to_rounding("tensor([0.4031, -2e-9])", "tensor([0.4032, 3e-8])")
    assert not same_up_to_rounding("tensor([0.4031])", "tensor([0.5031])")
    assert not same_up_to_rounding("(0.4, 'a')", "(0.4, 'b')")


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_notebook(name, tmp_path, warm_python):
    """From no records at all; one that asks for runs must have taken steps, and recorded it. What
    a notebook of the library shows is what is stored: no draw without a seed, nothing stale."""
    kernel = shlex.join(warm_python)
    done = reproduce("--only", name, out=tmp_path, python=warm_python, DBMTL_KERNEL_PYTHON=kernel)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    executed = tmp_path / "out" / "notebooks" / f"{name}.ipynb"
    assert executed.exists()
    if name.startswith(LIBRARY):
        pairs = zip(texts_displayed(executed), texts_displayed(path_of(name)), strict=True)
        assert [pair for pair in pairs if not same_up_to_rounding(*pair)] == []
    asks = re.search(r"\b(run_all|ask)\(", path_of(name).read_text(encoding="utf-8"))
    if asks and "scale" in papermill.inspect_notebook(path_of(name)):
        records = [
            json.loads(path.read_text()) for path in tmp_path.glob("out/smoke/runs/*/*.json")
        ]
        assert any(record["step"] > 0 for record in records)


@pytest.mark.parametrize("name", WITH_PARAMETERS)
def test_every_parameter_of_a_notebook_can_be_set(name):
    """papermill reads the cell line by line and leaves out what it cannot parse: quotes in a
    comment, for one."""
    names = set()
    for cell in parameter_cells(name):
        for statement in ast.parse(cell.source).body:
            names |= {target.id for target in statement.targets}
    assert set(papermill.inspect_notebook(path_of(name))) == names


def write_notebook(path, sources, parameters=False):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if parameters:
        cells[0].metadata.tags = ["parameters"]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=KERNEL), path)


@pytest.fixture
def project(tmp_path):
    """A small project with the real runner: one notebook that works, one with a parameter that
    fails on request."""
    root = tmp_path / "project"
    (root / "nbs").mkdir(parents=True)
    shutil.copytree(ROOT / "ci", root / "ci")
    write_notebook(root / "nbs" / "00_first.ipynb", ["1 + 1"])
    second = [
        "scale = 'smoke'  # size\nseeds = [0]  # which",
        "assert scale != 'cpu', seeds",
        "from pathlib import Path\n"
        "Path('../figures').mkdir(exist_ok=True)\n"
        "Path('../figures/plot.png').touch()",
    ]
    write_notebook(root / "nbs" / "41_second.ipynb", second, parameters=True)
    return root


def test_reproduce_runs_in_order_and_sums_up(project):
    done = reproduce(root=project, out=project)
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    table = lines[lines.index(["notebook", "seconds", "figures"]) + 1 :]
    assert [line[0] for line in table[:2]] == ["00_first", "41_second"]
    assert len(table[0]) == 2
    assert table[1][2] == "plot"
    copies = sorted(path.name for path in project.glob("out/notebooks/*"))
    assert copies == ["00_first.ipynb", "41_second.ipynb"]


def test_reproduce_stops_at_a_failed_cell_and_names_it(project):
    done = reproduce("--scale", "cpu", "-p", "seeds", "[1, 2]", root=project, out=project)
    assert done.returncode == 1
    place = "41_second.ipynb, cell 2 (assert scale != 'cpu', seeds)"
    assert f"{place}: AssertionError: [1, 2]" in done.stderr
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
        (
            ["--only", "secand"],
            "--only secand: no notebook of that name; did you mean '41_second'?",
        ),
    ],
)
def test_reproduce_refuses_what_no_notebook_knows(project, args, message):
    done = reproduce(*args, root=project, out=project)
    assert done.returncode == 1
    assert message in done.stderr
    assert not (project / "out").exists()


def test_reproduce_refuses_an_unknown_option_and_two_choices_at_once(project):
    done = reproduce("--quik", root=project, out=project)
    assert done.returncode == 1
    assert "--quik: unknown option; did you mean '--quick'?" in done.stderr
    done = reproduce("--quick", "--only", "first", root=project, out=project)
    assert done.returncode == 2
    assert "--only: not allowed with argument --quick" in done.stderr
    assert not (project / "out").exists()


@pytest.fixture(scope="module")
def runner():
    """ci/run_notebooks.py as a module."""
    spec = importlib.util.spec_from_file_location("run_notebooks", ROOT / "ci/run_notebooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_quick_notebooks_are_there_and_take_their_parameters(runner):
    assert [name for name in runner.QUICK if not path_of(name).exists()] == []
    declared = papermill.inspect_notebook(path_of(runner.QUICK[-1]))
    assert set(runner.QUICK_PARAMETERS) <= set(declared)


def test_recipes_without_their_packages_are_left_out(project, runner, monkeypatch, capsys):
    recipe = project / "nbs" / "50_recipe.ipynb"
    write_notebook(recipe, ["try:\n    import lightning as L\nexcept ImportError:\n    raise"])
    monkeypatch.setattr(runner, "ROOT", project)
    monkeypatch.setattr(runner, "find_spec", lambda name: None)
    chosen = runner.select_notebooks(None)
    assert recipe in chosen and runner.without_recipes(chosen) == chosen[:-1]
    printed = capsys.readouterr().out
    assert printed.startswith("left out: 50_recipe\n") and "--editable '.[recipes]'" in printed
    with pytest.raises(SystemExit, match="nothing is left to run"):
        runner.without_recipes([recipe])
    monkeypatch.setattr(runner, "find_spec", lambda name: name)
    assert runner.without_recipes(chosen) == chosen


def test_recipes_are_those_of_the_extra(runner):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    listed = project["optional-dependencies"]["recipes"]
    assert [re.match(r"\w+", text)[0] for text in listed] == runner.RECIPES


def test_options_to_suggest_are_those_that_there_are(runner, capsys):
    with pytest.raises(SystemExit):
        runner.parse_arguments(["--help"])
    usage = capsys.readouterr().out
    known = set(re.findall(r"(?<![\w-])--?[a-z]+", usage)) - {"-h"}
    assert known == set(runner.OPTIONS)


def test_quick_runs_its_notebooks_and_prints_numbers_caption_and_picture(project, runner):
    for name in runner.QUICK:
        path = project / "nbs" / f"{name}.ipynb"
        path.parent.mkdir(exist_ok=True)
        write_notebook(path, ["1 + 1"])
    sources = [
        "scale = 'smoke'  # size\njobs = 1  # processes",
        "assert (scale, jobs) == ('early', 3)",
        "from pathlib import Path\n"
        "folder = Path('../../out', scale)\n"
        "folder.mkdir()\n"
        "(folder / 'first_run.png').touch()\n"
        "(folder / 'first_run.svg').touch()\n"
        "(folder / 'first_run.csv').write_text('property,EW\\ncv,2.25\\n')\n"
        "(folder / 'cards').mkdir()\n"
        "(folder / 'cards' / 'first_run.json').write_text('{\"caption\": \"One seed.\"}')",
    ]
    write_notebook(project / "nbs" / f"{runner.QUICK[-1]}.ipynb", sources, parameters=True)
    done = reproduce("--quick", "-p", "jobs", "3", root=project, out=project)
    assert done.returncode == 0, done.stderr
    *_, summary, head, row, caption, picture = filter(None, done.stdout.splitlines())
    assert summary.startswith(f"{len(runner.QUICK)} of {len(runner.QUICK)} notebooks")
    assert (head.split(), row.split()) == (["property", "EW"], ["cv", "2.25"])
    assert caption == "One seed."
    assert picture == f"figure: {project / 'out' / 'early' / 'first_run.png'}"


def test_reproduce_runs_the_kernel_of_its_own_environment(project, tmp_path):
    """Even where another kernel named python3 comes first on Jupyter's path."""
    spec = tmp_path / "jupyter" / "kernels" / "python3"
    spec.mkdir(parents=True)
    kernel = {"argv": ["/bin/false", "{connection_file}"]} | KERNEL["kernelspec"]
    spec.joinpath("kernel.json").write_text(json.dumps(kernel))
    jupyter_path = str(tmp_path / "jupyter")
    done = reproduce("--only", "first", root=project, out=project, JUPYTER_PATH=jupyter_path)
    assert done.returncode == 0, done.stderr

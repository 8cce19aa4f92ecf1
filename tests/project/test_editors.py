"""What an editor shows: the names without running anything, types, and help."""

import ast
import importlib.util
import inspect
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import dbmtl
from dbmtl import DBMTL, Balancer, make_balancer
from dbmtl.core.balancer import BalancerOptions
from dbmtl.registry import method_classes

ROOT = Path(__file__).resolve().parents[2]
SOURCE = (ROOT / "dbmtl/__init__.py").read_text(encoding="utf-8")
CHECKER = [path] if (path := shutil.which("basedpyright") or shutil.which("pyright")) else []
if importlib.util.find_spec("basedpyright"):
    CHECKER = [sys.executable, "-m", "basedpyright"]


def in_a_new_process(code):
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def imported_for_editors():
    """{name: module} of the imports under TYPE_CHECKING."""
    imports = {}
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            for line in node.body:
                for alias in line.names:
                    imports[alias.asname or alias.name] = line.module
    return imports


def test_all_imports_and_lookup_name_the_same():
    methods = set(method_classes())
    assert set(dbmtl.__all__) == set(imported_for_editors()) == {*dbmtl._MODULES, *methods}
    assert len(dbmtl.__all__) == len(set(dbmtl.__all__))


def test_an_editor_is_sent_to_the_object_that_the_lookup_finds():
    for name, module in imported_for_editors().items():
        assert getattr(dbmtl, name).__module__ == module


def test_names_are_listed_without_torch():
    code = "import sys, dbmtl; names = dir(dbmtl); print('torch' in sys.modules, 'DBMTL' in names)"
    assert in_a_new_process(code) == "False True"


@pytest.mark.full
def test_star_import():
    code = "from dbmtl import *; print(DBMTL.__name__, make_balancer.__name__, CAGrad.__name__)"
    assert in_a_new_process(code) == "DBMTL make_balancer CAGrad"


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="module 'dbmtl' has no attribute 'Ballancer'"):
        _ = dbmtl.Ballancer


def test_the_package_is_marked_as_typed():
    assert (ROOT / "dbmtl/py.typed").is_file()
    assert '"py.typed"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@pytest.mark.parametrize("documented", [DBMTL, Balancer, make_balancer])
def test_help_shows_what_each_argument_means(documented):
    text = inspect.getdoc(documented)
    explained = set(
        re.findall(r"\w+", " ".join(re.findall(r"^    ([\w, ]+):", text, re.MULTILINE)))
    )
    parameters = set(inspect.signature(documented).parameters) - {"options"}
    if documented is DBMTL:
        parameters |= set(BalancerOptions.__annotations__)
    assert parameters == explained
    assert "Raises ValueError" in text and "TypeError" in text and ">>> balancer" in text


@pytest.mark.parametrize(
    "function",
    [DBMTL.__init__, Balancer.__init__, Balancer.backward, Balancer.accumulate, make_balancer],
)
def test_public_signatures_are_typed(function):
    parameters = inspect.signature(function).parameters.values()
    untyped = [p.name for p in parameters if p.annotation is p.empty and p.name != "self"]
    assert untyped == []


def test_the_options_of_every_method_are_those_of_the_balancer():
    own = {"self", "transform", "aggregator", "shared", "num_tasks", "ema", "level"}
    options = set(inspect.signature(Balancer.__init__).parameters) - own
    assert options == set(BalancerOptions.__annotations__)


# --------------------------------------------------------------------------------- a type checker


def first_example():
    """The README's example of a training loop, as the notebook holds it."""
    cells = json.loads((ROOT / "nbs/index.ipynb").read_text(encoding="utf-8"))["cells"]
    [source] = [
        "".join(cell["source"])
        for cell in cells
        if cell["cell_type"] == "code" and "Adam" in "".join(cell["source"])
    ]
    return source


MISTAKES = [
    ("num_tasks=", "num_taks=", 'No parameter named "num_taks"'),
    ("num_tasks=2", "num_tasks=2, betta=0.5", 'No parameter named "betta"'),
    ("backward(losses)", "backward(0.5)", '"float" is not assignable to "Sequence[Tensor]"'),
    ("backward(losses)", "backwards(losses)", 'attribute "backwards"'),
]


@pytest.fixture(scope="module")
def complaints(tmp_path_factory):
    """What the checker has against the example, {None: ...}, and against it with each mistake; all
    are read in one run, most of which goes into PyTorch."""
    if not CHECKER:
        pytest.skip("needs basedpyright (pip install .[dev]) or pyright")
    folder = tmp_path_factory.mktemp("examples")
    example = first_example()
    (folder / "right.py").write_text(example, encoding="utf-8")
    for number, (right, wrong, _) in enumerate(MISTAKES):
        assert example.count(right) == 1
        source = example.replace(right, wrong)
        (folder / f"wrong_{number}.py").write_text(source, encoding="utf-8")
    configuration = {"extraPaths": [str(ROOT)], "typeCheckingMode": "standard"}
    (folder / "pyrightconfig.json").write_text(json.dumps(configuration), encoding="utf-8")
    command = [*CHECKER, "--outputjson", "--pythonpath", sys.executable]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    entries = json.loads(done.stdout)["generalDiagnostics"]
    errors = {path.stem: [] for path in folder.glob("*.py")}
    for entry in entries:
        if entry["severity"] == "error":
            errors[Path(entry["file"]).stem].append(entry["message"])
    return errors


@pytest.mark.full
@pytest.mark.parametrize("number", range(len(MISTAKES)), ids=[wrong for _, wrong, _ in MISTAKES])
def test_a_type_checker_finds_mistakes_in_the_example_of_the_readme(complaints, number):
    assert any(MISTAKES[number][2] in text for text in complaints[f"wrong_{number}"])


@pytest.mark.full
def test_a_type_checker_has_nothing_against_the_example_of_the_readme(complaints):
    assert complaints["right"] == []

"""Runs the notebooks in order by papermill: the part of ci/reproduce that needs the environment."""

import argparse
import fnmatch
import json
import os
import re
import shlex
import sys
import tempfile
import textwrap
import time
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

from dbmtl.core.checks import nearest_name

ROOT = Path(__file__).resolve().parent.parent
SCALES = ["smoke", "early", "generated", "cpu", "gpu", "gpu-scratch", "paper", "paper-scratch"]
OPTIONS = ["--help", "--scale", "--only", "--quick", "--fresh", "-p"]
QUICK = [  # the method, and one benchmark trained
    "01_core/05_ema",
    "02_loss_balancing/01_log",
    "03_gradient_balancing/02_max_norm",
    "04_dbmtl",
    "17_site/07_first_run",
]
QUICK_PARAMETERS = {"scale": "early", "jobs": 2}
RECIPES = ["accelerate", "lightning", "tensorboard", "transformers"]  # the extra of that name
PICTURES_AND_NUMBERS = {".png", ".svg", ".csv"}
COLOURS = re.compile(r"\x1b\[[0-9;]*m")  # of a traceback in a terminal


class Result(NamedTuple):
    """One line of the closing table."""

    name: str  # of the notebook
    seconds: float
    figures: list[str]  # stems of the files that the notebook wrote
    pictures: list[Path]  # those of them that are PNG files
    failure: str | None  # what went wrong and where


def did_you_mean(name, known):
    """The end of an error message: the nearest of the known names, or all of them."""
    nearest = nearest_name(name, known)
    if nearest:
        return f"did you mean {nearest!r}?"
    return f"there are: {', '.join(sorted(known)) or 'none'}"


# --------------------------------------------------------------------------------- notebooks


def name_of(notebook):
    """What a notebook is called: its path below nbs/ without the suffix."""
    return notebook.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def all_notebooks():
    """The paths of all notebooks in reading order."""
    paths = (ROOT / "nbs").rglob("*.ipynb")
    return sorted(path for path in paths if ".ipynb_checkpoints" not in path.parts)


def quick_notebooks():
    """The few notebooks of --quick."""
    return [ROOT / "nbs" / f"{name}.ipynb" for name in QUICK]


def select_notebooks(pattern):
    """The notebooks of that very name; if there is none, those whose name contains or fits it."""
    notebooks = all_notebooks()
    if pattern is None:
        return notebooks
    named = [path for path in notebooks if pattern in (name_of(path), path.stem)]
    if named:
        return named
    matching = []
    for path in notebooks:
        name = name_of(path)
        if pattern in name or fnmatch.fnmatch(name, pattern):
            matching.append(path)
    if not matching:
        known = [name_of(path) if "/" in pattern else path.stem for path in notebooks]
        sys.exit(f"--only {pattern}: no notebook of that name; {did_you_mean(pattern, known)}")
    return matching


def lacks_packages(notebook):
    """Does a recipe need packages that are not installed?"""
    code = "\n".join(c.source for c in nbformat.read(notebook, 4).cells if c.cell_type == "code")
    imported = set(re.findall(r"^ *(?:import|from) (\w+)", code, re.MULTILINE))
    return any(name in imported and find_spec(name) is None for name in RECIPES)


def without_recipes(selected):
    """The notebooks that can run here; says which others were chosen, and what they need."""
    lacking = [notebook for notebook in selected if lacks_packages(notebook)]
    if lacking:
        names = ", ".join(name_of(notebook) for notebook in lacking)
        install = "-m pip install --constraint ci/constraints.txt --editable '.[recipes]'"
        print(f"left out: {names}\nthey need packages: {sys.executable} {install}", flush=True)
    if lacking == selected:
        sys.exit("nothing is left to run")
    return [notebook for notebook in selected if notebook not in lacking]


# -------------------------------------------------------------------------------- parameters


def parse_value(text):
    """A value from the command line: JSON or a constant of Python if it is one, else the text."""
    constants = {"True": True, "False": False, "None": None}
    if text in constants:
        return constants[text]
    try:
        return json.loads(text)
    except ValueError:
        return text


def requested_parameters(args, declared):
    """The parameters to set; each must be declared by one of the selected notebooks."""
    requested = {name: parse_value(text) for name, text in args.parameter}
    if args.scale:
        requested["scale"] = args.scale
    if args.fresh:
        requested["fresh"] = True
    declared_anywhere = set().union(*declared.values())
    for name in requested:
        if name not in declared_anywhere:
            hint = did_you_mean(name, declared_anywhere)
            sys.exit(f"parameter {name!r}: no selected notebook declares it; {hint}")
    defaults = QUICK_PARAMETERS if args.quick else {"scale": "smoke"}
    return {**defaults, **requested}


# --------------------------------------------------------------------------------------- run


def use_own_kernel(folder):
    """Makes `python3` mean this very interpreter, whatever kernels the machine has.

    DBMTL_KERNEL_PYTHON, a command line, takes its place: the tests start kernels faster.
    """
    python = shlex.split(os.environ.get("DBMTL_KERNEL_PYTHON", "")) or [sys.executable]
    kernel = {
        "argv": [
            *python,
            "-m",
            "ipykernel_launcher",
            "-f",
            "{connection_file}",
            "--log-level=CRITICAL",
        ],
        "display_name": "python3",
        "language": "python",
    }
    spec = Path(folder, "kernels", "python3")
    spec.mkdir(parents=True)
    spec.joinpath("kernel.json").write_text(json.dumps(kernel))
    jupyter_path = [str(folder)]
    if os.environ.get("JUPYTER_PATH"):
        jupyter_path.append(os.environ["JUPYTER_PATH"])
    os.environ["JUPYTER_PATH"] = os.pathsep.join(jupyter_path)
    os.environ["PYTHONPATH"] = str(ROOT)
    # small networks: two threads that wait for each other on busy cores took ten times as long
    # as one; `jobs` uses more
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def times_of_figures(root):
    """When each picture and its numbers were last written: {path: nanoseconds}."""
    times = {}
    for folder in ("figures", "out"):
        for path in (root / folder).rglob("*"):
            if path.suffix in PICTURES_AND_NUMBERS:
                times[path] = path.stat().st_mtime_ns
    return times


def failed_cell(notebook, executed):
    """The number, from 1, and the first line of the cell that failed in the executed copy."""
    failed_ids = set()
    for cell in nbformat.read(executed, 4).cells:
        if any(output.output_type == "error" for output in cell.get("outputs", [])):
            failed_ids.add(cell.id)
    for number, cell in enumerate(nbformat.read(notebook, 4).cells, start=1):
        if cell.id in failed_ids:
            return f"cell {number} ({cell.source.strip().splitlines()[0]})"
    return "the injected parameters"


def execute(notebook, parameters, copies):
    """Runs one notebook into the folder `copies`; returns None, or what went wrong and where."""
    executed = copies / notebook.relative_to(ROOT / "nbs")
    executed.parent.mkdir(parents=True, exist_ok=True)
    name = name_of(notebook)
    file = f"nbs/{name}.ipynb"
    try:
        papermill.execute_notebook(
            notebook,
            executed,
            parameters,
            kernel_name="python3",
            cwd=notebook.parent,
            progress_bar={"desc": name, "position": 1, "leave": False, "disable": None},
        )
    except PapermillExecutionError as error:
        traceback = "\n".join(error.traceback)
        if not sys.stderr.isatty():
            traceback = COLOURS.sub("", traceback)
        place = f"{file}, {failed_cell(notebook, executed)}"
        return f"{traceback}\n{place}: {error.ename}: {error.evalue}"
    except Exception as error:  # a kernel that died or never started
        return f"{file}: {type(error).__name__}: {error}"
    return None


def run(notebook, parameters, root, copies):
    """Runs one notebook, and tells how long it took and which figures it wrote."""
    before = times_of_figures(root)
    start = time.perf_counter()
    failure = execute(notebook, parameters, copies)
    seconds = time.perf_counter() - start
    after = times_of_figures(root)
    written = [path for path, written_at in after.items() if before.get(path) != written_at]
    stems = sorted({path.stem for path in written})
    pictures = sorted(path for path in written if path.suffix == ".png")
    return Result(name_of(notebook), seconds, stems, pictures, failure)


def run_until_failure(selected, requested, declared, root, copies):
    """Runs the selected notebooks in order, up to the first that fails."""
    results = []
    with tempfile.TemporaryDirectory() as folder:
        use_own_kernel(folder)
        for notebook in tqdm(selected, desc="notebooks", unit="", disable=None):
            parameters = {
                name: value for name, value in requested.items() if name in declared[notebook]
            }
            result = run(notebook, parameters, root, copies)
            results.append(result)
            if result.failure:
                break
            if not sys.stderr.isatty():
                print(f"{result.name}  {result.seconds:.0f} s", flush=True)
    return results


def print_table(results):
    """A line for each notebook that was run: seconds and figures."""
    width = max(len(result.name) for result in results)
    print(f"\n{'notebook':{width}}  seconds  figures")
    for result in results:
        figures = ", ".join(["FAILED"] * bool(result.failure) + result.figures)
        print(f"{result.name:{width}}  {result.seconds:7.1f}  {figures}".rstrip())


def print_pictures(results):
    """For each picture its numbers and its caption, where there are such files, and its path."""
    import pandas  # for --quick alone: the other calls need not wait for it

    for result in results:
        for path in result.pictures:
            numbers = path.with_suffix(".csv")
            if numbers.exists():
                print(f"\n{pandas.read_csv(numbers).to_string(index=False)}")
            card = path.parent / "cards" / f"{path.stem}.json"
            if card.exists():
                caption = json.loads(card.read_text(encoding="utf-8"))["caption"]
                print(f"\n{textwrap.fill(caption, 100)}")
            print(f"\nfigure: {path}")


def parse_arguments(arguments):
    parser = argparse.ArgumentParser(
        prog="ci/reproduce",
        description="Runs the notebooks and draws the figures.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--scale",
        help="smoke (default: minutes), cpu, gpu, paper, or another that the notebook names",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--only", metavar="PATTERN", help="notebooks whose name holds this or fits this glob"
    )
    which.add_argument(
        "--quick",
        action="store_true",
        help="in three minutes: the notebooks of the method, then EW and DB-MTL trained on the "
        "sample of QM9 at scale `early`, a table of their test errors and a picture",
    )
    parser.add_argument("--fresh", action="store_true", help="train again what is recorded already")
    parser.add_argument(
        "-p", dest="parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    args, unknown = parser.parse_known_args(arguments)
    if unknown:
        sys.exit(f"{unknown[0]}: unknown option; {did_you_mean(unknown[0], OPTIONS)}")
    if args.scale not in (None, *SCALES):
        sys.exit(f"--scale {args.scale}: unknown; {did_you_mean(args.scale, SCALES)}")
    return args


def main(arguments=None):
    args = parse_arguments(arguments)
    # of figures/ and out/, as in dbmtl.experiments.records
    root = Path(os.environ.get("DBMTL_OUT") or ROOT).resolve()
    copies = root / "out" / "notebooks"
    selected = without_recipes(quick_notebooks() if args.quick else select_notebooks(args.only))
    declared = {notebook: set(papermill.inspect_notebook(notebook)) for notebook in selected}
    requested = requested_parameters(args, declared)

    results = run_until_failure(selected, requested, declared, root, copies)

    print_table(results)
    total = sum(result.seconds for result in results)
    print(f"{len(results)} of {len(selected)} notebooks in {total:.0f} s", end="; ")
    print(f"executed copies in {copies}")
    if args.quick:
        print_pictures(results)
    if results[-1].failure:
        sys.exit(f"\n{results[-1].failure}")


if __name__ == "__main__":
    main()

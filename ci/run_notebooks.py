"""Runs the notebooks in order by papermill: the part of ci/reproduce that needs the environment."""

import argparse
import difflib
import fnmatch
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import papermill
from papermill.exceptions import PapermillExecutionError
from tqdm import tqdm

ROOT = Path(__file__).resolve().parent.parent
SCALES = ["smoke", "generated", "cpu", "gpu", "gpu-scratch", "paper", "paper-scratch"]


def nearest(name, names):
    """A hint for a message: the nearest of `names`, or all of them."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return (
        f"did you mean {close[0]!r}?"
        if close
        else f"there are: {', '.join(sorted(names)) or 'none'}"
    )


def name_of(path):
    """How a notebook is called: its path below nbs/ without the suffix."""
    return path.relative_to(ROOT / "nbs").with_suffix("").as_posix()


def notebooks(pattern=None):
    """Paths of the notebooks in reading order, those that match `pattern` (a glob or a part of the name)."""
    everything = (ROOT / "nbs").rglob("*.ipynb")
    paths = sorted(path for path in everything if ".ipynb_checkpoints" not in path.parts)
    names = [name_of(path) for path in paths]
    if pattern is None:
        return paths
    chosen = [path for path in paths if pattern in (name_of(path), path.stem)]
    if not chosen:
        chosen = [
            path
            for path, name in zip(paths, names, strict=True)
            if fnmatch.fnmatch(name, pattern) or pattern in name
        ]
    if not chosen:
        sys.exit(f"--only {pattern}: no notebook of that name; {nearest(pattern, names)}")
    return chosen


def literal(text):
    """A value from the command line: JSON where it is, else the text itself."""
    try:
        return json.loads(text)
    except ValueError:
        return {"True": True, "False": False, "None": None}.get(text, text)


def values(args, declared):
    """The parameters asked for; each must be declared by one of the selected notebooks."""
    given = {name: literal(value) for name, value in args.parameter}
    if args.scale:
        given["scale"] = args.scale
    if args.fresh:
        given["fresh"] = True
    known = sorted(set().union(*declared.values()))
    for name in given:
        if name not in known:
            sys.exit(
                f"parameter {name!r}: no selected notebook declares it; {nearest(name, known)}"
            )
    return {"scale": "smoke", **given}


def own_kernel(folder):
    """Makes `python3` mean this very interpreter, whatever kernels are installed for the user or the machine."""
    spec = Path(folder, "kernels", "python3")
    spec.mkdir(parents=True)
    argv = [
        sys.executable,
        "-m",
        "ipykernel_launcher",
        "-f",
        "{connection_file}",
        "--log-level=CRITICAL",
    ]
    spec.joinpath("kernel.json").write_text(
        json.dumps({"argv": argv, "display_name": "python3", "language": "python"})
    )
    os.environ["JUPYTER_PATH"] = os.pathsep.join(
        filter(None, [str(folder), os.environ.get("JUPYTER_PATH")])
    )
    os.environ["PYTHONPATH"] = str(ROOT)
    # small networks: two threads that wait for each other on busy cores took ten times as long as one; `jobs` uses more
    os.environ.setdefault("OMP_NUM_THREADS", "1")


def pictures(root):
    """When each picture and its numbers were last written."""
    found = [
        p
        for name in ("figures", "out")
        for p in (root / name).rglob("*")
        if p.suffix in {".png", ".svg", ".csv"}
    ]
    return {path: path.stat().st_mtime_ns for path in found}


def where(notebook, executed):
    """The number, from 1, of the cell of `notebook` that failed in the copy `executed`, and its first line."""
    copy = nbformat.read(executed, 4).cells
    failed = [
        cell.id for cell in copy if any(o.output_type == "error" for o in cell.get("outputs", []))
    ]
    for number, cell in enumerate(nbformat.read(notebook, 4).cells, start=1):
        if cell.id in failed:
            return f"cell {number} ({cell.source.strip().splitlines()[0]})"
    return "the injected parameters"


def run(notebook, parameters, copies):
    """Runs one notebook into the folder `copies`; returns None, or what went wrong and where."""
    executed = copies / notebook.relative_to(ROOT / "nbs")
    executed.parent.mkdir(parents=True, exist_ok=True)
    bar = {"desc": name_of(notebook), "position": 1, "leave": False, "disable": None}
    try:
        papermill.execute_notebook(
            notebook,
            executed,
            parameters,
            kernel_name="python3",
            cwd=notebook.parent,
            progress_bar=bar,
        )
    except PapermillExecutionError as error:
        trace = "\n".join(error.traceback)
        if not sys.stderr.isatty():
            trace = re.sub(r"\x1b\[[0-9;]*m", "", trace)
        return f"{trace}\n{name_of(notebook)}, {where(notebook, executed)}: {error.ename}: {error.evalue}"
    except Exception as error:  # a kernel that died or never started
        return f"{name_of(notebook)}: {type(error).__name__}: {error}"


def main(argv=None):
    parser = argparse.ArgumentParser(
        prog="ci/reproduce", description="Runs the notebooks and draws the figures."
    )
    parser.add_argument(
        "--scale",
        help="smoke (default: minutes), cpu, gpu, paper, or another that the notebook names",
    )
    parser.add_argument(
        "--only", metavar="PATTERN", help="notebooks whose name holds this or fits this glob"
    )
    parser.add_argument("--fresh", action="store_true", help="train again what is recorded already")
    parser.add_argument(
        "-p", dest="parameter", nargs=2, action="append", default=[], metavar=("NAME", "VALUE")
    )
    args = parser.parse_args(argv)
    if args.scale not in [None, *SCALES]:
        sys.exit(f"--scale {args.scale}: unknown; {nearest(args.scale, SCALES)}")

    root = Path(
        os.environ.get("DBMTL_OUT") or ROOT
    ).resolve()  # of figures/ and out/, as in dbmtl.experiments.records
    copies = root / "out" / "notebooks"
    selected = notebooks(args.only)
    declared = {path: set(papermill.inspect_notebook(path)) for path in selected}
    wanted = values(args, declared)

    rows, failure = [], None
    with tempfile.TemporaryDirectory() as folder:
        own_kernel(folder)
        for notebook in tqdm(selected, desc="notebooks", unit="", disable=None):
            before, start = pictures(root), time.perf_counter()
            failure = run(
                notebook, {k: v for k, v in wanted.items() if k in declared[notebook]}, copies
            )
            written = {
                path.stem for path, when in pictures(root).items() if before.get(path) != when
            }
            rows.append((name_of(notebook), time.perf_counter() - start, sorted(written)))
            if failure:
                break
            if not sys.stderr.isatty():
                print(f"{rows[-1][0]}  {rows[-1][1]:.0f} s", flush=True)

    width = max(len(name) for name, *_ in rows)
    print(f"\n{'notebook':{width}}  seconds  figures")
    for name, seconds, written in rows:
        failed = ["FAILED"] if failure and name == rows[-1][0] else []
        print(f"{name:{width}}  {seconds:7.1f}  {', '.join(failed + written)}".rstrip())
    total = sum(seconds for _, seconds, _ in rows)
    print(f"{len(rows)} of {len(selected)} notebooks in {total:.0f} s; executed copies in {copies}")
    if failure:
        sys.exit(f"\n{failure}")


if __name__ == "__main__":
    main()

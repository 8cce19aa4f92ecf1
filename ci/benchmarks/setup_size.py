"""What each extra takes to download and on disk: its packages and what they require.

    python ci/benchmarks/setup_size.py     where `dev` and `book` are installed; downloads them all

Writes figures/benchmarks/setup_size.csv and setup_size.md.
"""

import csv
import platform
import subprocess
import sys
import tempfile
import tomllib
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[2]
OUT = ROOT / "figures" / "benchmarks"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
ROWS = {  # extra: what is typed, and what it is for
    "": ("`pip install .`", "`import dbmtl` in a loop of your own"),
    "lab": ("`pip install '.[lab]'`", "`python -m dbmtl.run`, its tables and figures"),
    "reproduce": ("`ci/reproduce`", "running the notebooks: data, papermill and a kernel"),
    "notebooks": ("`ci/lab`", "writing them: JupyterLab and nbdev"),
    "book": ("`ci/book`", "a site of the notebooks: Sphinx and MathJax"),
    "recipes": ("`pip install '.[recipes]'`", "`nbs/18_recipes`"),
    "ray": ("`pip install '.[ray]'`", "`--cluster ray`"),
    "dask": ("`pip install '.[dask]'`", "`--cluster dask`"),
    "dev": ("`ci/test`, `ci/refresh`", "all but the book, and what tests compare with"),
}


def written_in(extra):
    """The requirements of an extra, those of the extras that it names included."""
    found = []
    for text in EXTRAS[extra] if extra else PROJECT["dependencies"]:
        requirement = Requirement(text)
        if requirement.name == "dbmtl":
            found += [each for name in requirement.extras for each in written_in(name)]
        else:
            found.append(requirement)
    return found


def installed_with(extra):
    """{name: distribution} of all that an extra brings; None for what is not installed here."""
    found = {}
    seen = set()
    waiting = written_in(extra) + written_in("")
    while waiting:
        requirement = waiting.pop()
        name = canonicalize_name(requirement.name)
        if (name, frozenset(requirement.extras)) in seen:
            continue
        seen.add((name, frozenset(requirement.extras)))
        try:
            found[name] = distribution(name)
        except PackageNotFoundError:
            found[name] = None
            continue
        for each in map(Requirement, found[name].requires or []):
            extras = ("", *requirement.extras)
            if each.marker is None or any(each.marker.evaluate({"extra": e}) for e in extras):
                waiting.append(each)
    return found


def megabytes(installed):
    """The size of the files of a distribution, compiled ones included."""
    paths = [Path(file.locate()) for file in installed.files or []]
    return sum(path.stat().st_size for path in paths if path.is_file()) / 1e6


def downloaded(extra):
    """The size in MB of the archives that pip fetches for an extra."""
    requirements = map(str, written_in(extra) + written_in(""))
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "pip", "download", "-qq", "--no-cache-dir"]
        command += ["--dest", folder, "--constraint", ROOT / "ci" / "constraints.txt"]
        subprocess.run([*command, *requirements], check=True)
        return sum(path.stat().st_size for path in Path(folder).iterdir()) / 1e6


def measure(extra):
    """Packages and megabytes of an extra; raises ValueError where some are not installed."""
    installed = installed_with(extra)
    lacking = sorted(name for name, one in installed.items() if one is None)
    if lacking:
        raise ValueError(f"the extra {extra!r} is not installed: {', '.join(lacking)}")
    sizes = {name: megabytes(one) for name, one in installed.items()}
    largest = sorted(sizes, key=sizes.get, reverse=True)[:4]
    return {
        "extra": extra,
        "packages": len(sizes),
        "download_mb": round(downloaded(extra), -1),
        "disk_mb": round(sum(sizes.values()), -1),
        "largest": ", ".join(f"{name} {sizes[name]:.0f}" for name in largest),
    }


def markdown(measured):
    """The table, with a sentence on how it was measured."""
    lines = [
        "| command | for | extra | packages | download | on disk | the largest, MB |",
        "|---|---|---|---|---|---|---|",
    ]
    for extra, row in measured.items():
        command, purpose = ROWS[extra]
        cells = [command, purpose, f"`{extra}`" if extra else "none", row["packages"]]
        cells += [f"{float(row[size]):,.0f} MB" for size in ("download_mb", "disk_mb")]
        cells.append(row["largest"])
        lines.append(f"| {' | '.join(map(str, cells))} |")
    table = "\n".join(lines)
    return f"""# What setting up takes

{table}

Each with all that it requires, in the versions of `ci/constraints.txt`, with a build of PyTorch
for the CPU; {platform.system()}, Python {platform.python_version()}. A build with CUDA takes
several gigabytes more. Written by `ci/benchmarks/setup_size.py`.
"""


def main():
    try:
        measured = {extra: measure(extra) for extra in ROWS}
    except ValueError as error:
        sys.exit(str(error))
    with (OUT / "setup_size.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(measured[""]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(measured.values())
    (OUT / "setup_size.md").write_text(markdown(measured))
    print(markdown(measured))


if __name__ == "__main__":
    main()

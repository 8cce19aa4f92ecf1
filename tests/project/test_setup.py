"""What each command installs: its extra of pyproject.toml, and nothing that another needs."""

import csv
import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = {
    "book": "book",
    "lab": "notebooks",
    "refresh": "dev",
    "reproduce": "reproduce",
    "test": "dev",
}
CLUSTERS = {"ray", "dask", "distributed"}
OF_DEVELOPERS = {"pytest", "hypothesis", "torchjd", "cvxpy", "nbdev", "jupyterlab", "ruff"}
OF_RECIPES = {"accelerate", "lightning", "transformers", "tensorboard"}


@pytest.fixture(scope="module")
def sizes():
    """ci/benchmarks/setup_size.py as a module."""
    path = ROOT / "ci" / "benchmarks" / "setup_size.py"
    spec = importlib.util.spec_from_file_location("setup_size", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_command_names_its_extra(sizes):
    assert set(COMMANDS.values()) <= set(sizes.EXTRAS)
    found = {}
    for path in (ROOT / "ci").iterdir():
        if path.is_file() and (match := re.search(r'/setup\.sh"(.*)$', path.read_text(), re.M)):
            found[path.name] = match[1].strip()
    assert found == COMMANDS


def test_an_environment_that_holds_more_is_not_set_up_again(sizes):
    """`extras_with` of ci/setup.sh says what pyproject.toml says."""
    script = (ROOT / "ci" / "setup.sh").read_text()
    told = {name: names.split() for name, names in re.findall(r'(\w+)\) echo "(.+)" ;;', script)}
    written = {extra: set(map(str, sizes.written_in(extra))) for extra in COMMANDS.values()}
    for extra, needed in written.items():
        holding = {other for other, there in written.items() if needed <= there}
        assert set(told.get(extra, [extra])) == holding, extra


@pytest.mark.parametrize("extra", ["", "lab", "reproduce", "notebooks", "book", "recipes"])
def test_clusters_come_with_their_own_extra(sizes, extra):
    assert sizes.installed_with(extra).keys() & CLUSTERS == set()


def test_who_runs_notebooks_gets_nothing_of_developers_or_recipes(sizes):
    assert sizes.installed_with("reproduce").keys() & (OF_DEVELOPERS | OF_RECIPES) == set()
    assert sizes.installed_with("book").keys() & (OF_DEVELOPERS | OF_RECIPES) == set()
    assert sizes.installed_with("dev").keys() >= OF_DEVELOPERS | OF_RECIPES | CLUSTERS


def test_the_table_of_sizes_has_every_extra_of_a_command(sizes):
    for command, extra in COMMANDS.items():
        assert f"ci/{command}" in sizes.ROWS[extra][0], command
    with (ROOT / "figures/benchmarks/setup_size.csv").open(newline="") as file:
        rows = {row["extra"]: row for row in csv.DictReader(file)}
    assert list(rows) == list(sizes.ROWS)
    page = (ROOT / "figures/benchmarks/setup_size.md").read_text()
    assert sizes.markdown(rows).partition("Each with")[0] == page.partition("Each with")[0]


def test_the_readme_has_the_sizes_of_the_table():
    with (ROOT / "figures/benchmarks/setup_size.csv").open(newline="") as file:
        rows = {row["extra"]: row for row in csv.DictReader(file)}
    download, disk = (
        [f"{float(rows[extra][size]) / 1000:.1f}" for extra in ("reproduce", "dev")]
        for size in ("download_mb", "disk_mb")
    )
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        f"{download[0]} GB to download and {disk[0]} GB on disk for reproducing, "
        f"{download[1]} and {disk[1]} GB for testing" in readme
    )


def test_an_extra_that_is_not_installed_is_named(sizes, monkeypatch):
    monkeypatch.setitem(sizes.EXTRAS, "lab", ["a-package-that-is-not-there"])
    with pytest.raises(ValueError, match="'lab' is not installed: a-package-that-is-not-there"):
        sizes.measure("lab")

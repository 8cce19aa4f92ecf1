"""The wheel and the source archive: they hold every module and asset, install into a bare
environment, and `import dbmtl` needs torch and numpy alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import venv
import zipfile
from email import message_from_bytes
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

import dbmtl

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = [
    "matplotlib",
    "seaborn",
    "scipy",
    "pandas",
    "tabulate",
    "torchmetrics",
    "tqdm",
    "nbdev",
    "fastcore",
    "execnb",
    "papermill",
    "IPython",
    "torch_geometric",
    "ray",
    "dask",
    "distributed",
]
IMPORT_ALONE = """
import sys, json
before = set(sys.modules)
import dbmtl
print(json.dumps(sorted(set(sys.modules) - before)))
"""
IMPORT = """
import json, sys, torch, numpy
before = set(sys.modules)
import dbmtl
print(json.dumps([dbmtl.__file__, dbmtl.__version__, sorted(set(sys.modules) - before)]))
"""
EVERY_NAME = f"""
import sys, torch, numpy
sys.modules.update(dict.fromkeys({HEAVY!r}))      # None: importing it raises
import dbmtl
names = [name for name in dir(dbmtl) if not name.startswith("_")]
for name in names: getattr(dbmtl, name)
print(len(names))
"""
BUILD = """
import os, sys
from setuptools import build_meta
tree, out = sys.argv[1:]
os.chdir(tree)
build_meta.build_wheel(out)
build_meta.build_sdist(out)
"""


def run(*command, **environment):
    """What a command prints, outside of the project; it must succeed."""
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd="/", env=clean | environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def python(executable, code, **environment):
    return run(executable, "-c", code, **environment)


def required_by(*names):
    """Installed distributions of these names and of all that they require, extras aside."""
    distributions = {}
    waiting = list(names)
    while waiting:
        name = waiting.pop()
        if name in distributions:
            continue
        try:
            distributions[name] = distribution(name)
        except PackageNotFoundError:
            continue
        for text in distributions[name].requires or []:
            requirement = Requirement(text)
            if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
                waiting.append(requirement.name)
    return distributions.values()


def files_of_the_package():
    """Every module and asset that the project has, as paths below its root."""
    package = ROOT / "dbmtl"
    paths = [path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    return {path.relative_to(ROOT).as_posix() for path in paths}


@pytest.fixture(scope="module")
def archives(tmp_path_factory):
    """Wheel and source archive, built from a copy: setuptools leaves and reads build/ there."""
    tree = tmp_path_factory.mktemp("tree")
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "dbmtl", tree / "dbmtl", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("archives")
    run(sys.executable, "-c", BUILD, tree, out)
    return out


@pytest.fixture(scope="module")
def wheel(archives):
    (path,) = archives.glob("dbmtl-*.whl")
    return path


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The Python of a new environment: torch, numpy, what they require, and the wheel."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder)
    executable = folder / "bin" / "python"
    site = python(executable, "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    for dist in required_by("torch", "numpy"):
        for top in {file.parts[0] for file in dist.files} - {"..", "__pycache__"}:
            if not Path(site, top).exists():
                Path(site, top).symlink_to(dist.locate_file(top))
    pip = [sys.executable, "-m", "pip", "--python", executable]
    run(*pip, "install", "-q", "--no-deps", wheel)
    return executable


def test_package_wheel_holds_every_module_and_asset(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if name.startswith("dbmtl/")} == files_of_the_package()


def test_package_source_archive_holds_every_module_and_asset(archives):
    (path,) = archives.glob("dbmtl-*.tar.gz")
    with tarfile.open(path) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert files_of_the_package() <= names
    assert {"LICENSE", "NOTICE", "README.md", "pyproject.toml", "setup.py"} <= names


def test_package_description_links_and_pictures_are_addresses_of_files(wheel):
    """PyPI shows README.md by itself, beside no other file."""
    (name,) = [name for name in zipfile.ZipFile(wheel).namelist() if name.endswith("/METADATA")]
    metadata = message_from_bytes(zipfile.ZipFile(wheel).read(name))
    assert metadata["Description-Content-Type"] == "text/markdown"
    text = metadata.get_payload(decode=True).decode("utf-8")
    repository = PROJECT["urls"]["Repository"]
    assert f"![Losses of a small task; DB-MTL minus equal weighting]({repository}/raw/main/" in text
    targets = re.findall(r"\]\(([^)]+)\)|(?:src|href)=\"([^\"]+)", text)
    targets = [markdown or html for markdown, html in targets]
    assert [target for target in targets if not target.startswith(("https://", "#"))] == []
    ours = [target for target in targets if target.startswith(repository)]
    below = [target.removeprefix(repository).split("/main/")[1] for target in ours]
    assert [path for path in below if not (ROOT / path.partition("#")[0]).exists()] == []
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(targets) == len(re.findall(r"\]\(", readme))


def test_package_wheel_imports_in_a_bare_environment(bare):
    file, version, modules = json.loads(python(bare, IMPORT))
    assert str(bare.parent.parent) in file
    assert version == dbmtl.__version__
    assert not set(HEAVY) & {name.split(".")[0] for name in modules}


@pytest.mark.parametrize("module", ["dbmtl.run", "dbmtl.prepare"])
def test_package_wheel_has_its_commands(module, bare):
    assert f"usage: python -m {module}" in run(bare, "-m", module, "--help")


def test_package_import_loads_nothing_else():
    """Neither torch nor any module of the package comes with `import dbmtl`."""
    modules = json.loads(python(sys.executable, IMPORT_ALONE, PYTHONPATH=str(ROOT)))
    assert [name for name in modules if name.partition(".")[0] == "dbmtl"] == ["dbmtl"]
    assert {name.partition(".")[0] for name in modules} <= {"dbmtl", *sys.stdlib_module_names}


def test_package_import_is_light():
    """A fresh `import dbmtl` after torch brings in no more than dbmtl itself."""
    *_, modules = json.loads(python(sys.executable, IMPORT, PYTHONPATH=str(ROOT)))
    assert {name.split(".")[0] for name in modules} <= {"dbmtl", *sys.stdlib_module_names}


def test_package_every_public_name_needs_torch_and_numpy_only():
    count = int(python(sys.executable, EVERY_NAME, PYTHONPATH=str(ROOT)))
    assert count >= 3


def test_package_requirements():
    assert sorted(PROJECT["dependencies"]) == ["numpy", "torch>=2.7"]
    assert PROJECT["requires-python"] == ">=3.11"
    assert {"qm9", "lab", "notebooks", "dev"} <= set(PROJECT["optional-dependencies"])


def test_package_lowest_torch_is_the_one_that_is_tested():
    workflow = (ROOT / ".github/workflows/ci.yml").read_text(encoding="utf-8")
    (torch,) = [text for text in PROJECT["dependencies"] if text.startswith("torch")]
    assert f"{torch.replace('>=', '==')}.0 " in workflow


def test_package_constraints_are_exact_and_cover_what_the_project_names():
    lines = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    exact = re.compile(r"[\d.]+(post\d+)?")
    assert [name for name, version in pins.items() if not exact.fullmatch(version)] == []
    named = list(PROJECT["dependencies"])
    for requirements in PROJECT["optional-dependencies"].values():
        named += requirements
    for requirement in map(Requirement, named):
        if requirement.name != "dbmtl":
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_package_settings_and_version_agree():
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    settings = dict(re.findall(r"^(\w+) = (.*)$", text, flags=re.M))
    assert settings["version"] == dbmtl.__version__
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert re.findall(r"^version: (.+)$", citation, flags=re.M) == [dbmtl.__version__]
    assert settings["requirements"].split() == PROJECT["dependencies"]
    assert settings["update_pyproject"] == "False"
    assert settings["allowed_cell_metadata_keys"] == "tags"


def test_package_citation_of_the_paper_is_whole_and_is_the_readme_s():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert {"cff-version", "message", "title", "authors"} <= set(citation)
    paper = citation["preferred-citation"]
    assert {"type", "title", "authors", "journal", "year", "url"} <= set(paper)
    assert paper["year"] == 2023 and len(paper["authors"]) == 9
    assert paper["status"] == "in-press"  # a value of the format; the paper is accepted
    first = paper["authors"][0]
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert (
        f"{first['given-names'][0]}. {first['family-names']} et al., *{paper['title']}*, "
        f"arXiv {paper['url'].rpartition('/')[2]}, {paper['year']} "
        f"(accepted by {paper['journal']})"
    ) in readme


def changelog_sections():
    """{version: its text}, newest first; each heading has a date, but for the unreleased part."""
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    heading = r"^## \[(Unreleased|\d+\.\d+\.\d+)\](?: - \d{4}-\d\d-\d\d)?\n"
    _, *parts = re.split(heading, text, flags=re.M)
    return dict(zip(parts[::2], parts[1::2], strict=True))


def test_package_version_is_the_newest_of_the_changelog():
    sections = changelog_sections()
    unreleased, newest, *_ = sections
    assert (unreleased, newest) == ("Unreleased", dbmtl.__version__)
    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert len(re.findall("^## ", text, flags=re.M)) == len(sections)
    kinds = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}
    for section in sections.values():
        headings = re.findall("^### (.+)$", section, flags=re.M)
        assert set(headings) <= kinds and len(set(headings)) == len(headings)


@pytest.mark.parametrize("tag", ["v0.0.1", dbmtl.__version__])
def test_package_release_refuses_a_tag_of_another_version(tag):
    done = subprocess.run([ROOT / "ci/release", tag], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert f"the tag is {tag}, and settings.ini has version {dbmtl.__version__}" in done.stderr

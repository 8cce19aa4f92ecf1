"""The wheel: it builds, installs into a bare environment, and `import dbmtl` needs torch and numpy alone."""

import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import dbmtl

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
HEAVY = (
    "matplotlib seaborn scipy pandas tqdm nbdev fastcore execnb papermill IPython torch_geometric ray dask distributed"
).split()
IMPORT = """
import json, sys, torch, numpy
before = set(sys.modules)
import dbmtl
print(json.dumps([dbmtl.__file__, dbmtl.__version__, sorted(set(sys.modules) - before)]))
"""
EVERY_NAME = """
import sys, torch, numpy
sys.modules.update(dict.fromkeys({heavy!r}))      # None: importing it raises
import dbmtl
names = [name for name in dir(dbmtl) if not name.startswith("_")]
for name in names: getattr(dbmtl, name)
print(len(names))
"""


def python(executable, code, **env):
    command = [executable, "-c", code]
    clean = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(
        command, cwd="/", env=clean | env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def needed(*names):
    """Installed distributions of these names and of all that they require, extras aside."""
    found, todo = {}, list(names)
    while todo:
        name = todo.pop()
        if name not in found:
            try:
                found[name] = distribution(name)
            except PackageNotFoundError:
                continue
            wants = [Requirement(text) for text in found[name].requires or []]
            todo += [
                want.name
                for want in wants
                if want.marker is None or want.marker.evaluate({"extra": ""})
            ]
    return found.values()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Built from a copy, because setuptools leaves and reads build/ in the tree."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in ("pyproject.toml", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, tree)
    shutil.copytree(ROOT / "dbmtl", tree / "dbmtl", ignore=shutil.ignore_patterns("__pycache__"))
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        out,
        tree,
    ]
    done = subprocess.run(build, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return next(out.glob("dbmtl-*.whl"))


@pytest.fixture(scope="module")
def bare(wheel, tmp_path_factory):
    """The Python of a new environment that holds torch, numpy, what they require, and the wheel."""
    folder = tmp_path_factory.mktemp("bare")
    venv.create(folder)
    executable = folder / "bin" / "python"
    site = Path(
        python(executable, "import sysconfig; print(sysconfig.get_path('purelib'))").strip()
    )
    for dist in needed("torch", "numpy"):
        for top in {file.parts[0] for file in dist.files} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(dist.locate_file(top))
    install = [
        sys.executable,
        "-m",
        "pip",
        "--python",
        executable,
        "install",
        "-q",
        "--no-deps",
        wheel,
    ]
    done = subprocess.run(install, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return executable


def test_package_wheel_imports_in_a_bare_environment(bare):
    file, version, modules = json.loads(python(bare, IMPORT))
    assert str(bare.parent.parent) in file
    assert version == dbmtl.__version__
    assert not set(HEAVY) & {name.split(".")[0] for name in modules}


def test_package_wheel_carries_its_assets(bare):
    file, *_ = json.loads(python(bare, IMPORT))
    tracked = {path.name for path in (ROOT / "dbmtl" / "assets").glob("*")}
    assert {path.name for path in Path(file).parent.joinpath("assets").glob("*")} == tracked


def test_package_import_is_light():
    """A fresh `import dbmtl` after torch brings in no more than dbmtl itself."""
    *_, modules = json.loads(python(sys.executable, IMPORT, PYTHONPATH=str(ROOT)))
    assert {name.split(".")[0] for name in modules} <= {"dbmtl", *sys.stdlib_module_names}


def test_package_every_public_name_needs_torch_and_numpy_only():
    count = int(python(sys.executable, EVERY_NAME.format(heavy=HEAVY), PYTHONPATH=str(ROOT)))
    assert count >= 3


def test_package_requirements():
    assert sorted(PROJECT["dependencies"]) == ["numpy", "torch>=2.7"]
    assert PROJECT["requires-python"] == ">=3.11"
    assert {"qm9", "notebooks", "dev"} <= set(PROJECT["optional-dependencies"])


def test_package_constraints_are_exact_and_cover_what_the_project_names():
    lines = (ROOT / "ci" / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pins = dict(line.split("==") for line in lines if line and not line.startswith("#"))
    assert [
        name for name, version in pins.items() if not re.fullmatch(r"[\d.]+(post\d+)?", version)
    ] == []
    wanted = [
        text for group in PROJECT["optional-dependencies"].values() for text in group
    ] + PROJECT["dependencies"]
    for requirement in map(Requirement, wanted):
        if requirement.name != "dbmtl":
            assert requirement.specifier.contains(pins[requirement.name]), requirement


def test_package_settings_and_version_agree():
    text = (ROOT / "settings.ini").read_text(encoding="utf-8")
    settings = dict(re.findall(r"^(\w+) = (.*)$", text, flags=re.M))
    assert settings["version"] == dbmtl.__version__
    assert settings["requirements"].split() == PROJECT["dependencies"]
    assert (
        settings["update_pyproject"] == "False" and settings["allowed_cell_metadata_keys"] == "tags"
    )

"""The tree as it would be committed: sizes, words that do not belong, the licence, the commands."""

import os
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOREIGN = {  # written so that this file does not hold what it looks for
    r"(?<![\w.])/[w]ork/[a-z]": None,
    r"(?<![\w.~])/[t]mp/[a-z]": None,
    r"(?<![\w.])/[r]oot/[a-z.]": None,
    r"(?<![\w.])/[h]ome/[a-z]": None,
    r"\.\./[s]hared": ".ci/run",
    r"(?i)[s]ubagent": None,
    r"(?i)[H]200 lease": None,
    r"(?i)[b]efore-stop": None,
    r"(?i)[t]his session\b": None,
    r"<{7} |>{7} ": "tests/project/test_notebooks_shape.py",
}
BINARY = {".npz", ".png", ".ico", ".gz"}


def tracked():
    """Files that git has or would take; outside a checkout there is nothing to ask."""
    listing = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    done = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]


def foreign(files):
    """(file, words) for each foreign word in a file that may not hold it."""
    for name, text in files:
        for pattern, allowed in FOREIGN.items():
            if str(name) != allowed and (found := re.search(pattern, text)):
                yield str(name), found[0]


def test_tracked_files_are_small():
    sizes = {str(path): (ROOT / path).stat().st_size for path in tracked()}
    assert {path: size for path, size in sizes.items() if size > 1_500_000} == {}
    assert sum(sizes.values()) < 24_000_000


def test_records_and_pictures_are_small():
    sizes = {
        str(path): (ROOT / path).stat().st_size for path in tracked() if path.parts[0] == "figures"
    }
    assert {
        path: size
        for path, size in sizes.items()
        if path.endswith((".json", ".png")) and size > 61_440
    } == {}


def test_no_smoke_record_is_tracked():
    records = [
        path
        for path in tracked()
        if path.parts[:2] == ("figures", "runs") and path.suffix == ".json"
    ]
    assert [
        str(path) for path in records if re.search(r'"name": "smoke"', (ROOT / path).read_text())
    ] == []


def test_no_foreign_words():
    texts = [
        (path, (ROOT / path).read_text(encoding="utf-8"))
        for path in tracked()
        if path.suffix not in BINARY
    ]
    assert list(foreign(texts)) == []


def test_foreign_words_are_found():
    paths = [
        "/" + "work/a",
        "/" + "root/a",
        "/" + "home/a",
        "in /" + "tmp/x",
        "../" + "shared/data",
    ]
    words = [*paths, "a Sub" + "agent", "<" * 7 + " HEAD", "this " + "session"]
    assert len(list(foreign((word, word) for word in words))) == len(words)


@pytest.mark.parametrize("name", ["ci/reproduce", "ci/test", "ci/lab", "ci/refresh", ".ci/run"])
def test_commands_are_executable_and_parse(name):
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / name], check=True)


def test_licence_and_notice():
    assert (
        "Apache License" in (ROOT / "LICENSE").read_text()
        and "Version 2.0" in (ROOT / "LICENSE").read_text()
    )
    notice = (ROOT / "NOTICE").read_text()
    assert "CC0" in notice and "LibMTL" in notice

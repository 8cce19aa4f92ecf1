"""The tree as it would be committed: sizes, words that do not belong, the licence, the commands."""

import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from helpers.records import record_texts

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
BINARY = {".npz", ".png", ".ico", ".gz", ".xz"}
COMMANDS = [
    "ci/reproduce",
    "ci/test",
    "ci/lab",
    "ci/refresh",
    "ci/book",
    "ci/release",
    ".ci/run",
]


def tracked():
    """Files that git has or would take; outside a checkout there is nothing to ask."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listing = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if listing.returncode:
        pytest.skip("not a git checkout")
    return [Path(name) for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]


def sizes():
    """{path: bytes} of the tracked files."""
    return {path: (ROOT / path).stat().st_size for path in tracked()}


def foreign(texts):
    """(file, words) for each foreign word in a file that may not hold it."""
    for name, text in texts:
        for pattern, allowed in FOREIGN.items():
            if str(name) != allowed and (words := re.search(pattern, text)):
                yield str(name), words[0]


def test_tracked_files_are_small():
    assert [path for path, size in sizes().items() if size > 1_500_000] == []
    assert sum(sizes().values()) < 26_000_000


def test_records_and_pictures_are_small():
    limits = {".json": 61_440, ".png": 122_880}  # a picture has 200 dots an inch
    figures = {path: size for path, size in sizes().items() if path.parts[0] == "figures"}
    large = [path for path, size in figures.items() if size > limits.get(path.suffix, size)]
    assert large == []


def test_no_smoke_record_is_tracked():
    records = [json.loads(text) for text in record_texts(ROOT / "figures" / "runs")]
    assert len(records) > 100
    assert [r["identity"] for r in records if r["config"]["scale"]["name"] == "smoke"] == []


@pytest.mark.full
def test_no_foreign_words():
    readable = [path for path in tracked() if path.suffix not in BINARY]
    texts = [(path, (ROOT / path).read_text(encoding="utf-8")) for path in readable]
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


@pytest.mark.parametrize("name", COMMANDS)
def test_commands_are_executable_and_parse(name):
    assert os.access(ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", ROOT / name], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-x", name], cwd=ROOT, check=True)


def test_licence_and_notice():
    licence = (ROOT / "LICENSE").read_text()
    assert "Apache License" in licence
    assert "Version 2.0" in licence
    notice = (ROOT / "NOTICE").read_text()
    assert "CC0" in notice
    assert "LibMTL" in notice

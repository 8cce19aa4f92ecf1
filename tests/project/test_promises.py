"""README's promises name test files and count their cases; here they are counted again."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
LINE = re.compile(r"^\| (?P<promise>.+) \| (?P<files>`tests/.+`) \| (?P<cases>\d+)\+ \|$", re.M)


def promises():
    """Files and the least number of cases, a pair for each line of the table."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    return [
        (tuple(re.findall("`(.+?)`", line["files"])), int(line["cases"]))
        for line in LINE.finditer(text)
    ]


def test_there_are_promises():
    assert len(promises()) >= 6


@pytest.mark.full
def test_promises_are_tested_by_as_many_cases_as_they_say():
    every_file = sorted({file for files, _ in promises() for file in files})
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", *every_file]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    collected = [line.partition("::")[0] for line in run.stdout.splitlines() if "::" in line]
    for files, least in promises():
        cases = sum(collected.count(file) for file in files)
        assert least <= cases <= 2 * least, f"{files}: {cases} cases, README says {least}+"

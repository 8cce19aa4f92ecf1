"""The forms of `.github`: they ask for the facts that are needed, and the example in them runs."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
FORMS = {
    path.stem: yaml.safe_load(path.read_text(encoding="utf-8"))
    for path in sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
    if path.stem != "config"
}
FACTS = {  # form: what it asks for
    "bug_report": ["what", "example", "method", "losses", "versions"],
    "wrong_number": ["where", "numbers", "kind", "evidence"],
    "new_method": ["paper", "rule", "kind", "defaults", "help"],
}


def test_there_is_a_form_for_each_kind():
    assert set(FORMS) == set(FACTS)


@pytest.mark.parametrize("name", FACTS)
def test_a_form_asks_for_the_facts(name):
    form = FORMS[name]
    assert form["name"] and form["description"]
    assert [field["id"] for field in form["body"]] == FACTS[name]
    for field in form["body"]:
        assert field["type"] in {"input", "textarea", "dropdown", "checkboxes"}
        assert field["attributes"]["label"]


@pytest.mark.full
def test_the_example_of_the_bug_report_runs(tmp_path):
    fields = {field["id"]: field for field in FORMS["bug_report"]["body"]}
    script = tmp_path / "example.py"
    script.write_text(fields["example"]["attributes"]["value"], encoding="utf-8")
    command = [sys.executable, "-W", "error", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr

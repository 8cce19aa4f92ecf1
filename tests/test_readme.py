"""README.md is what ci/readme.py makes of the index notebook, and its examples run."""

import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = re.findall(r"^```python\n(.*?)^```", README, flags=re.S | re.M)


def test_readme_is_current(tmp_path):
    made = tmp_path / "README.md"
    subprocess.run([sys.executable, ROOT / "ci" / "readme.py", made], check=True)
    assert made.read_text(encoding="utf-8") == README, "run ci/refresh index"


def test_readme_has_an_example():
    assert any("import" in example and "backward" in example for example in EXAMPLES)


@pytest.mark.parametrize("example", EXAMPLES, ids=range(len(EXAMPLES)))
def test_readme_example_runs(example, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(example, encoding="utf-8")
    command = [sys.executable, "-W", "error", script]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_readme_links_and_pictures_exist():
    targets = re.findall(r"\]\((?!https?://|#)([^)#\s]+)", README)
    assert [target for target in targets if not (ROOT / target).exists()] == []


def test_readme_rendering_leaves_out_the_hidden_and_shows_the_shown():
    sys.path.insert(0, str(ROOT / "ci"))
    try:
        from readme import render
    finally:
        sys.path.pop(0)
    code = nbformat.v4.new_code_cell("1 + 1", outputs=[nbformat.v4.new_output("execute_result", {"text/plain": "2"})])
    hidden = nbformat.v4.new_code_cell("#| hide\nsecret = 1")
    prose = nbformat.v4.new_markdown_cell("![a](../figures/a.png)")
    text = render(nbformat.v4.new_notebook(cells=[prose, code, hidden]))
    assert text == "![a](figures/a.png)\n\n```python\n1 + 1\n```\n\n```\n2\n```\n"

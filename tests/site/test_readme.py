"""README.md is what ci/readme.py makes of the index notebook, and its examples run."""

import json
import math
import re
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from helpers.records import record_texts
from scipy import stats

from dbmtl.report.effects import in_three_sentences, measured_effects

pytestmark = pytest.mark.full

ROOT = Path(__file__).resolve().parents[2]
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
    code = nbformat.v4.new_code_cell(
        "1 + 1", outputs=[nbformat.v4.new_output("execute_result", {"text/plain": "2"})]
    )
    hidden = nbformat.v4.new_code_cell("#| hide\nsecret = 1")
    prose = nbformat.v4.new_markdown_cell("![a](../figures/a.png)")
    text = render(nbformat.v4.new_notebook(cells=[prose, code, hidden]))
    assert text == "![a](figures/a.png)\n\n```python\n1 + 1\n```\n\n```\n2\n```\n"


# ------------------------------------------------------------ the front's numbers, by another route

NAMES = {
    "QM9": "qm9",
    "Office-31": "office31",
    "NYUv2": "nyuv2",
    "generated streets": "cityscapes",
    "PACS": "pacs",
}
CORNERS = ["EW", "loss-only", "gradient-only", "DB-MTL"]


def percent(record, base, rule):
    """Delta_p of a run over the single-task run of its seed, from their stored metrics."""
    test = metrics(record, rule)
    single = metrics(base, rule)
    parts = []
    for task, better in record["directions"].items():
        changes = [
            (1 if way == "up" else -1) * 100 * (test[task][m] / single[task][m] - 1)
            for m, way in better.items()
        ]
        parts.append(statistics.fmean(changes))
    return sum(parts) / len(parts)


def metrics(record, rule):
    """Test metrics by the rule whose label begins with a word: best or average."""
    return next(
        found["test"] for label, found in record["selected"].items() if label.startswith(rule)
    )


def recomputed(folder, benchmark, scale, rule):
    """{method: {seed: delta_p}} of the corners whose runs all learned every task."""
    runs = {}
    found = [json.loads(text) for text in record_texts(Path(folder))]
    newest = max(
        record["config"]["protocol"]
        for record in found
        if record["config"]["benchmark"] == benchmark and record["config"]["method"] == "STL"
    )
    for record in found:
        config = record["config"]
        if (config["benchmark"], config["scale"]["name"]) != (benchmark, scale):
            continue
        if config["protocol"] != newest:
            continue
        is_corner = config["method"] in ["STL", *CORNERS] and not config["hyper"]
        if is_corner and record["state"] == "finished":
            runs.setdefault(config["method"], {})[config["seed"]] = record
    stl = runs.pop("STL")
    good = {
        name: each
        for name, each in runs.items()
        if all(learned(run, rule) for run in each.values())
    }
    return {
        name: {seed: percent(run, stl[seed], rule) for seed, run in sorted(each.items())}
        for name, each in good.items()
    }


def learned(record, rule):
    """Is every task 5 % better than its floor, on average over its metrics?"""
    for task, better in record["directions"].items():
        floor = record["floors"]["test"][task]
        found = metrics(record, rule)[task]
        gains = [
            (1 if way == "up" else -1) * (found[m] - floor[m]) / abs(floor[m])
            for m, way in better.items()
        ]
        if sum(gains) / len(gains) < 0.05:
            return False
    return True


def agrees(cell, values):
    """Does a cell such as "1.2 ± 0.4" say mean and half width, to its last digit?"""
    if len(values) < 3:
        return abs(float(cell.split(" ")[0]) - statistics.fmean(values)) <= 1e-3 * max(
            1, abs(values[0])
        )
    mean, half = cell.split(" ± ")
    width = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return all(
        abs(float(text) - value) <= 0.51 * 10 ** -len(text.partition(".")[2])
        for text, value in ((mean, statistics.fmean(values)), (half, width))
    )


def stale(text, folder):
    """The cells of the front's table that the records in a folder do not bear out."""
    wrong = []
    table = [line for line in text.splitlines() if line.startswith("|")]
    for line in table[2:]:
        name, rule, runs, *cells = (cell.strip() for cell in line.strip("|").split(" | "))
        if runs == "not run":
            wrong += [name for cell in cells[:5] if cell != "not run"]
            continue
        scale, seeds, *_ = runs.split(", ")
        word = "best" if rule.startswith("best") else "average"
        found = recomputed(folder, NAMES[name], scale, word)
        if found and int(seeds.split()[0]) != min(map(len, found.values())):
            wrong.append((name, runs))
        if "EW" in found and "DB-MTL" in found:
            found["difference"] = {
                s: v - found["EW"][s] for s, v in found["DB-MTL"].items() if s in found["EW"]
            }
        for method, cell in zip([*CORNERS, "difference"], cells, strict=False):
            numbers = bool(re.match(r"-?\d", cell))
            if numbers != (method in found) or (
                numbers and not agrees(cell, list(found[method].values()))
            ):
                wrong.append((name, rule, method, cell))
    return wrong


FRONT = (ROOT / "figures" / "site" / "front.md").read_text(encoding="utf-8")


def test_front_numbers_are_those_of_the_records():
    assert stale(FRONT, ROOT / "figures" / "runs") == []
    results = (ROOT / "figures" / "site" / "results.md").read_text(encoding="utf-8").strip()
    assert results in README
    made = in_three_sentences(measured_effects())
    assert [line[2:] for line in results.splitlines()] == made
    assert "](figures/site/front.png)" in README and "](figures/site/front.md)" in README


@pytest.mark.parametrize("method", ["DB-MTL", "STL"])
def test_front_numbers_are_stale_once_a_record_changes(method, tmp_path):
    for text in record_texts(ROOT / "figures" / "runs"):
        record = json.loads(text)
        config = record["config"]
        if (config["benchmark"], config["scale"]["name"]) == ("office31", "cpu"):
            name = f"cpu-{config['method']}-s{config['seed']}-{record['identity'][:8]}.json"
            (tmp_path / name).write_text(text)
    kept = ("| bench", "|---", "| Office-31")
    table = "\n".join(line for line in FRONT.splitlines() if line.startswith(kept))
    assert stale(table, tmp_path) == []
    found = {
        path: json.loads(path.read_text()) for path in tmp_path.glob(f"cpu-{method}-s1-*.json")
    }
    changed, record = next(
        (path, record)
        for path, record in found.items()
        if not record["config"]["hyper"] and record["config"]["protocol"] == 2
    )
    for found in record["selected"].values():
        found["test"]["dslr"]["accuracy"] -= 2
    changed.write_text(json.dumps(record))
    assert stale(table, tmp_path) != []


def test_front_is_what_its_notebook_makes_of_the_records(tmp_path, monkeypatch):
    """Sentences and picture too: the same in another folder, different when a record differs."""
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    figures = tmp_path / "figures"
    shutil.copytree(
        ROOT / "figures" / "runs", figures / "runs", ignore=shutil.ignore_patterns("checkpoints")
    )
    shutil.copytree(ROOT / "figures" / "evidence", figures / "evidence")
    names = {"display": print}
    cells = [
        c.source
        for c in nbformat.read(ROOT / "nbs" / "17_site/02_front.ipynb", 4).cells
        if c.cell_type == "code"
    ]
    for cell in cells:
        exec(cell, names)
    for name in ("front.md", "front.csv", "cards/front.json"):
        made = (figures / "site" / name).read_text()
        assert made == (ROOT / "figures" / "site" / name).read_text(), (
            "run ci/reproduce --only 17_site/02_front"
        )
    (figures / "runs" / "pacs-cpu.jsonl.xz").unlink()
    for cell in cells:
        exec(cell, names)
    assert "| PACS | - | not run |" in (figures / "site" / "front.md").read_text()


def test_readme_has_no_typed_result_beside_the_included_ones():
    """No percentage, interval or count of seeds in the prose that is written by hand."""
    notebook = nbformat.read(ROOT / "nbs" / "index.ipynb", 4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert re.findall(r"\d+(?:\.\d+)? ?(?:%|percent|points|seeds)|±|\bthree seeds", prose) == []

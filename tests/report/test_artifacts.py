"""What a notebook leaves: files in the folder of its part, and a card each."""

import json

import matplotlib.pyplot as plt
import pytest

from dbmtl.report.artifacts import Artifacts, shelf

NOTEBOOK = "15_paper/01_table1_nyuv2"


def run(state="finished", scale="cpu"):
    size = {"name": scale, "train_size": 8, "epochs": 1, "batch_size": 4, "width": 2}
    config = {"benchmark": "toy", "method": "EW", "hyper": {}, "seed": 0, "protocol": 2}
    config["scale"] = size | {"learning_rate": 1e-3}
    return {"config": config, "state": state, "steps": 2, "device": "cpu: test"}


def test_artifacts_have_a_card_each(tmp_path):
    artifacts = Artifacts(NOTEBOOK, {"nyuv2": []}, folder=tmp_path)
    made = artifacts.table("t", [{"a": 1}], "A table.")
    fig = plt.figure(figsize=(1, 1))
    made += artifacts.figure("f", fig, "A figure.", [{"x": 1.0}])
    other = artifacts.of(runs={}, data="printed numbers", scale="")
    made.append(other.card("c", "A card."))
    made += artifacts.figure("empty", fig, "Nothing drawn.", [])
    plt.close("all")
    assert sorted(path.relative_to(tmp_path).as_posix() for path in made) == [
        *(f"cards/{stem}.json" for stem in ("c", "empty", "f", "t")),
        *("empty.png", "empty.svg", "f.csv", "f.png", "f.svg", "t.csv", "t.md"),
    ]
    table, computed = (json.loads((tmp_path / f"cards/{stem}.json").read_text()) for stem in "tc")
    assert table["runs"] == {"nyuv2": None} and table["caption"] == "A table."
    assert table["command"] == "ci/reproduce --only 15_paper/01_table1_nyuv2 --scale paper"
    assert computed["runs"] == {} and computed["data"] == "printed numbers"
    assert computed["command"] == "ci/reproduce --only 15_paper/01_table1_nyuv2"


@pytest.mark.parametrize(
    "runs, folder",
    [
        ([], "figures/paper"),
        ([run()], "figures/paper"),
        ([run(), run("diverged")], "figures/paper"),
        ([run(), run("pending")], "out/unfinished/paper"),
        ([run("stopped")], "out/unfinished/paper"),
        ([run(scale="smoke")], "out/smoke/figures/paper"),
    ],
)
def test_only_results_are_put_on_the_shelf(runs, folder, tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    assert shelf(NOTEBOOK, {"qm9": [], "toy": runs}) == tmp_path / folder
    assert Artifacts(NOTEBOOK, {"toy": runs}).folder == tmp_path / folder


def test_a_notebook_without_a_part_has_no_shelf():
    with pytest.raises(ValueError, match="must be like"):
        shelf("figure5", {})


def test_a_card_counts_the_runs(tmp_path):
    runs = [run(), run("diverged")]
    runs[1]["config"]["seed"] = 1
    path = Artifacts(NOTEBOOK, {"toy": runs}, folder=tmp_path).card("x", "Caption.")
    shown = json.loads(path.read_text())["runs"]["toy"]
    assert shown["runs"] == 2 and shown["finished"] == 1 and shown["methods"] == 1
    assert (shown["fewest"], shown["seeds"], shown["device"]) == (2, 2, ["cpu: test"])
    assert shown["protocol"] == 2
    before = path.read_bytes()
    Artifacts(NOTEBOOK, {"toy": runs}, folder=tmp_path).card("x", "Caption.")
    assert path.read_bytes() == before

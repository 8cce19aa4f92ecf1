"""Every recorded number in one tidy data frame."""

import math

import pytest

from dbmtl.experiments.method_labels import label_of
from dbmtl.experiments.records import read_records, runs_folder, selected
from dbmtl.experiments.run import run_all
from dbmtl.report.runs import COLUMNS, PROTOCOLS, load_runs


@pytest.fixture(scope="module")
def committed():
    return read_records(runs_folder("paper"))


@pytest.fixture(scope="module")
def runs(committed):
    return load_runs(committed)


def test_every_selected_number_is_a_row(committed, runs):
    assert list(runs.columns) == COLUMNS
    numbers = 0
    for record in committed:
        for rule, selection in record["selected"].items():
            if rule not in PROTOCOLS:  # an epoch chosen on test: no rule of ours
                assert rule == "best test epoch"
                continue
            for split in ("test", "validation"):
                numbers += sum(len(metrics) for metrics in selection.get(split, {}).values())
    assert len(runs.dropna(subset="value")) == numbers > 4000
    keys = ["version", "benchmark", "scale", "label", "seed", "protocol", "split"]
    assert not runs.duplicated([*keys, "task", "metric"]).any()


@pytest.mark.parametrize("protocol", ["best", "last ten"])
def test_rows_hold_what_the_records_hold(committed, runs, protocol):
    validated = [run for run in committed if "best validation epoch" in run["selected"]]
    for record in validated[::37]:
        config = record["config"]
        is_run = (
            (runs["benchmark"] == config["benchmark"])
            & (runs["scale"] == config["scale"]["name"])
            & (runs["method"] == config["method"])
            & (runs["seed"] == config["seed"])
            & (runs["version"] == config["protocol"])
            & (runs["split"] == "test")
            & (runs["protocol"] == protocol)
        )
        settings = label_of(record).partition("(")[2].rstrip(")")
        ours = runs[is_run & (runs["settings"] == settings)].set_index(["task", "metric"])
        for task, metrics in selected(record, protocol).items():
            for metric, value in metrics.items():
                row = ours.loc[(task, metric)]
                assert row["value"] == value
                assert row["floor"] == record["floors"]["test"][task][metric]
                assert row["better"] == record["directions"][task][metric]


def test_one_benchmark_and_scale_alone(committed):
    ours = load_runs(committed, benchmark="qm9", scale="early")
    assert set(ours["benchmark"]) == {"qm9"} and set(ours["scale"]) == {"early"}
    assert len(load_runs(committed, benchmark="qm9")) > len(ours)
    assert len(load_runs(committed, benchmark="no such")) == 0


def test_runs_of_a_folder_and_of_run_all_are_the_same(tmp_path):
    made = run_all("toy", ["STL", "DB-MTL(beta=0.1)"], [0], "smoke", out=tmp_path)
    from_list = load_runs(made)
    from_folder = load_runs(folder=tmp_path)
    assert set(from_list["settings"]) == {"", "beta=0.1"}
    by = ["method", "protocol", "split", "task", "metric"]
    first = from_list.sort_values(by)["value"].tolist()
    assert first == from_folder.sort_values(by)["value"].tolist()


def test_a_run_without_a_result_is_one_row_without_a_value(committed):
    lost = dict(committed[0], state="diverged", selected={})
    table = load_runs([lost])
    assert len(table) == 1
    assert table["state"][0] == "diverged" and math.isnan(table["value"][0])


def test_no_records_are_an_empty_table_with_all_columns(tmp_path):
    assert list(load_runs([]).columns) == COLUMNS
    assert load_runs(folder=tmp_path).empty

"""Which records a page shows, whether they may be compared, and what was run, in words."""

from dataclasses import replace

import pytest
from helpers.records import small_record

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.records import configuration, run_identity, write_record
from dbmtl.report import runs
from dbmtl.report.runs import (
    check_comparable,
    current_records,
    data_in_words,
    describe_runs,
    lost_runs,
    records_to_draw,
    span,
)


def record(method, seed, a=1.0, b=50.0, state="finished", scale="cpu", **changes):
    """A small record: task a's floor is 2 (lower is better), task b's is 10 (higher is better)."""
    test = {"a": {"MAE": a}, "b": {"Acc": b}}
    selected = {"best validation epoch": {"epoch": 1, "test": test}}
    return small_record(method, seed, selected, (2.0, 10.0), state, scale, **changes)


@pytest.mark.parametrize("change", [{"epochs": 4}, {"width": 9}, {"name": "gpu"}])
def test_runs_of_different_sizes_are_not_mixed(change):
    other = record("EW", 0)
    other["config"]["scale"] |= change
    with pytest.raises(ValueError, match="'EW', seed 0, is not comparable: its scale differ"):
        check_comparable([record("STL", 0), other])


def test_runs_of_other_data_are_not_mixed():
    other = record("EW", 1)
    other["config"]["hyper"] = {"c": 1}
    check_comparable([record("EW", 1), other])  # a label of its own
    with pytest.raises(ValueError, match="data differ"):
        check_comparable([record("STL", 0), record("EW", 0, data={"hash": "y", "note": ""})])
    with pytest.raises(ValueError, match="two records of 'EW', seed 0"):
        check_comparable([record("EW", 0), record("EW", 0)])


def test_notes_are_compared_over_all_seeds_and_hashes_within_one():
    def made(method, seed, digest, note):
        return record(method, seed) | {"data": {"hash": digest, "note": note}}

    check_comparable(
        [
            made("EW", 0, "a", "generated"),
            made("EW", 1, "b", "generated"),
            made("STL", 1, "b", "generated"),
        ]
    )
    with pytest.raises(ValueError, match="its data differ"):
        check_comparable(
            [made("EW", 0, "a", "generated"), made("EW", 1, "b", "sample of 7,000 molecules")]
        )
    pending = {"config": record("EW", 0)["config"], "state": "pending"}
    with pytest.raises(ValueError, match="its data differ"):
        check_comparable(
            [pending, made("STL", 0, "a", "generated"), made("DB-MTL", 0, "b", "generated")]
        )


def stored(folder, method, seed=0, scale="cpu", sizes=None, hyper=None):
    """A record on disk whose configuration is the toy's present one, or of other `sizes`."""
    made = record(method, seed)
    made["config"] = configuration("toy", method, seed, "cpu", hyper)
    made["config"]["scale"] |= {"name": scale} | (sizes or {})
    made["identity"] = run_identity(made["config"], "x")
    write_record(made, folder)
    return made


def test_draws_the_best_scale_that_can_be_compared(tmp_path):
    made = [record("STL", 0, scale="smoke"), record("EW", 0, scale="smoke")]
    assert records_to_draw("toy", made, folder=tmp_path) == ("smoke", made)
    stored(tmp_path, "STL")
    assert records_to_draw("toy", made, folder=tmp_path) == ("smoke", made), (
        "a baseline alone is no table"
    )
    stored(tmp_path, "EW")
    assert records_to_draw("toy", made, folder=tmp_path) == ("smoke", made), (
        "nor is one method beside it"
    )
    stored(tmp_path, "loss-only")
    stored(tmp_path, "DB-MTL", hyper={"beta": 0.1})
    stored(tmp_path, "DB-MTL", sizes={"epochs": 41})
    scale, records = records_to_draw("toy", made, folder=tmp_path)
    assert scale == "cpu" and [r["config"]["method"] for r in records] == ["EW", "STL", "loss-only"]


def test_draws_paper_scale_before_cpu(tmp_path):
    toy = get_benchmark("toy")
    both = replace(toy, scales=toy.scales | {"paper": toy.scales["cpu"]})
    for scale in ("cpu", "paper"):
        for method in ("STL", "EW", "loss-only"):
            stored(tmp_path, method, scale=scale)
    assert records_to_draw(both, [], folder=tmp_path)[0] == "paper"


def test_current_records_are_configured_as_today(tmp_path):
    made = [stored(tmp_path, "EW"), stored(tmp_path, "EW", sizes={"epochs": 41})]
    made += [stored(tmp_path, "DB-MTL", hyper={"beta": 0.1}), stored(tmp_path, "EW", scale="gpu")]
    assert current_records(made, "toy", "cpu") == made[:1]
    assert current_records(made, "toy", "cpu", {"EW", "DB-MTL(beta=0.1)"}) == [made[0], made[2]]
    assert current_records(made, "toy", "cpu", {"UW"}) == []
    assert current_records(made, "qm9", "cpu") == []
    assert records_to_draw("toy", [], folder=tmp_path) == ("not run", [])


def test_lost_runs_are_listed():
    lost = lost_runs([record("EW", 0), record("EW", 1, state="diverged")])
    assert lost == ["EW seed 1 diverged at step 5 of 30 (the loss of a is not finite)"]


def test_marks_records_of_older_code(monkeypatch):
    """Those whose replay differs; a record that was never replayed is not marked."""
    replayed = {"EW": True, "DB-MTL": False, "CAGrad": None}
    monkeypatch.setattr(runs, "is_current", lambda record: replayed[method_of(record)])
    assert "older code" not in describe_runs([record("EW", 0), record("CAGrad", 0)])
    assert "older code: DB-MTL" in describe_runs([record("EW", 0), record("DB-MTL", 0)])


def method_of(run):
    return run["config"]["method"]


def test_describes_scale_device_and_seeds():
    records = [record("EW", 0), record("EW", 1), record("DB-MTL", 0)]
    text = describe_runs(records)
    assert text == "cpu scale, 30 steps on cpu: test, 1 to 2 seeds a method"
    assert describe_runs(records, with_device=False) == text.replace(" on cpu: test", "")
    assert data_in_words(records) == "generated"
    with pytest.raises(ValueError, match="records is empty"):
        describe_runs([])


def test_spans_in_words():
    assert (span([2, 2]), span({1, 3}), span([5])) == ("2", "1 to 3", "5")

"""Records: identity, whole files, thinning, places, floors."""

import copy
import json
import lzma
import os
import re
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest

from dbmtl.benchmarks.base import Scale
from dbmtl.benchmarks.toy import toy
from dbmtl.core.files import write_atomically
from dbmtl.experiments import records
from dbmtl.experiments.records import (
    DamagedRecord,
    above_floor,
    configuration,
    encode_record,
    figures_folder,
    find_record,
    pack_records,
    project_root,
    protocol_note,
    read_archive,
    read_record,
    read_records,
    round_numbers,
    run_identity,
    runs_folder,
    scan_records,
    selected,
    thin,
    write_record,
)
from dbmtl.experiments.train import train

ROOT = Path(__file__).resolve().parents[2]


def made(method="EW", seed=0, state="finished", data="d", **more):
    config = configuration(toy, method, seed, "smoke", more.pop("hyper", None))
    identity = run_identity(config, data)
    return {"identity": identity, "config": config, "data": {"hash": data}, "state": state} | more


# ----------------------------------------------------------------------------------------- archives


def test_packed_records_are_found_and_replaced(tmp_path):
    for seed in (0, 1):
        write_record(made(seed=seed), tmp_path)
    before = read_records(tmp_path)
    [archive] = pack_records(tmp_path)
    assert archive.name == "toy-smoke.jsonl.xz" and not list(tmp_path.glob("*/*.json"))
    assert read_records(tmp_path) == before
    assert find_record(made(seed=1)["config"], tmp_path)["config"]["seed"] == 1
    write_record(made(seed=1, state="diverged"), tmp_path)
    assert [r["state"] for r in read_records(tmp_path)] == ["finished", "diverged"]
    assert find_record(made(seed=1)["config"], tmp_path)["state"] == "diverged"
    pack_records(tmp_path)
    assert [r["state"] for r in read_records(tmp_path)] == ["finished", "diverged"]
    assert pack_records(tmp_path) == []


def test_records_stay_where_the_archive_cannot_be_written(tmp_path, monkeypatch):
    path = write_record(made(), tmp_path)

    def is_full(path, content):
        raise OSError("No space left on device")

    monkeypatch.setattr(records, "write_atomically", is_full)
    with pytest.raises(OSError, match="No space left"):
        pack_records(tmp_path)
    assert read_record(path)["config"] == made()["config"]


def test_a_packed_record_of_other_data_is_not_found(tmp_path):
    record = made(data="d")
    write_record(record, tmp_path)
    pack_records(tmp_path)
    assert find_record(record["config"], tmp_path, data_hash="other") is None
    assert find_record(record["config"], tmp_path, data_hash="d")["identity"] == record["identity"]
    assert find_record(record["config"], tmp_path)["identity"] == record["identity"]


def test_an_archived_record_has_its_tasks_in_the_order_of_the_benchmark(tmp_path):
    """Tables and curves follow the order of the tasks, which the sorted keys of an archive lose."""
    curves = {"train": {task: [2.0, 1.0] for task in toy.task_names}, "epochs": [1, 2]}
    pairs = ["unit|large", "unit|small", "large|small"]
    monitors = {"cosines": dict.fromkeys(pairs, [0.5]), "steps": [0]}
    record = made(curves=curves, monitors=monitors, directions=toy.directions)
    write_record(record, tmp_path)
    [archive] = pack_records(tmp_path)
    [again] = read_archive(archive)[0]
    assert list(again["curves"]["train"]) == list(again["directions"]) == toy.task_names
    assert toy.task_names != sorted(toy.task_names)
    assert list(again["monitors"]["cosines"]) == pairs


def test_a_damaged_line_is_named_and_hides_no_other(tmp_path):
    for seed in (0, 1):
        write_record(made(seed=seed), tmp_path)
    [archive] = pack_records(tmp_path)
    lines = lzma.decompress(archive.read_bytes()).splitlines()
    lines[0] = lines[0].replace(b"finished", b"diverged")
    archive.write_bytes(lzma.compress(b"\n".join(lines)))
    records, damaged = scan_records(tmp_path)
    assert [r["config"]["seed"] for r in records] == [1]
    assert "line 1" in damaged[0].reason and damaged[0].path == archive
    write_record(made(seed=2), tmp_path)
    with pytest.raises(DamagedRecord, match="line 1"):
        pack_records(tmp_path)
    assert len(list(tmp_path.glob("toy/*.json"))) == 1
    archive.write_bytes(archive.read_bytes()[:-20])
    assert read_archive(archive)[0] == [] and "toy-smoke" in str(read_archive(archive)[1][0])


# ----------------------------------------------------------------------------------------- identity


def test_identity_changes_with_every_field_of_the_configuration():
    base = configuration(toy, "EW", 0, "smoke", {"beta": 0.5})
    seen = {run_identity(base, "d"), run_identity(base, "e")}
    for key in base:
        seen.add(run_identity(base | {key: "another"}, "d"))
    assert len(seen) == 2 + len(base)


def test_the_default_learning_rate_in_words_is_no_other_configuration():
    rate = toy.scale("smoke").learning_rate
    plain = configuration(toy, "EW", 0, "smoke")
    settings = {"learning_rate": rate}
    assert configuration(toy, "EW", 0, "smoke", settings) == plain
    assert settings == {"learning_rate": rate}  # the caller's own are left alone
    other = configuration(toy, "EW", 0, "smoke", {"learning_rate": 2 * rate})
    assert other == plain | {"hyper": {"learning_rate": 2 * rate}}


def test_identity_changes_with_every_field_of_the_scale():
    scale = toy.scale("smoke")
    seen = set()
    for field in fields(Scale):
        value = getattr(scale, field.name)
        other = {"new": 1} if isinstance(value, dict) else value + 1
        changed = replace(toy, scales={"smoke": replace(scale, **{field.name: other})})
        seen.add(run_identity(configuration(changed, "EW", 0, "smoke"), "d"))
    assert (
        len(seen | {run_identity(configuration(toy, "EW", 0, "smoke"), "d")})
        == len(fields(Scale)) + 1
    )


def test_identity_does_not_depend_on_the_order_of_keys_or_on_json():
    one = configuration(toy, "EW", 0, "smoke", {"a": 1, "b": [1, 2]})
    other = configuration(toy, "EW", 0, "smoke", {"b": (1, 2), "a": 1})
    assert run_identity(one, "d") == run_identity(json.loads(json.dumps(other)), "d")


def test_configuration_refuses_what_json_cannot_hold():
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises(ValueError, match="plain finite JSON"):
            configuration(toy, "EW", 0, "smoke", {"beta": value})


# -------------------------------------------------------------------------------------- whole files


def test_atomic_write_replaces_whole_files_and_leaves_nothing_behind(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr(records.os, "fsync", full)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new and longer")
    assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_atomic_write_puts_a_new_file_in_place_of_the_old(tmp_path):
    path, same = tmp_path / "file", tmp_path / "link"
    write_atomically(path, b"old")
    os.link(path, same)
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and same.read_bytes() == b"old"  # never written over


def test_atomic_write_killed_halfway_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"old")
    program = (
        "import os, signal, sys; from dbmtl.core.files import write_atomically\n"
        "os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)\n"
        "write_atomically(sys.argv[1], b'new')"
    )
    run = subprocess.run([sys.executable, "-c", program, str(path)])
    assert run.returncode == -9 and path.read_bytes() == b"old"


def test_a_record_round_trips_and_is_found(tmp_path):
    record = made(curves={"epochs": [1], "train": {"a": [1 / 3]}})
    path = write_record(record, tmp_path)
    again = read_record(path)
    assert again["curves"]["train"]["a"] == [0.333333] and again["config"] == record["config"]
    assert find_record(record["config"], tmp_path) == again
    assert find_record(record["config"], tmp_path, data_hash="d") == again
    assert find_record(record["config"], tmp_path, data_hash="other") is None
    assert find_record(configuration(toy, "EW", 5, "smoke"), tmp_path) is None


def test_records_of_two_data_sets_do_not_overwrite_each_other(tmp_path):
    assert write_record(made(data="one"), tmp_path) != write_record(made(data="two"), tmp_path)
    assert len(read_records(tmp_path)) == 2


def test_records_are_filtered_and_sorted(tmp_path):
    for method in ("STL", "EW"):
        for seed in (10, 2):
            write_record(made(method, seed), tmp_path)
    write_record(made("EW", 3, state="diverged"), tmp_path)
    pairs = [
        (r["config"]["method"], r["config"]["seed"])
        for r in read_records(tmp_path, state="finished")
    ]
    assert pairs == [("EW", 2), ("EW", 10), ("STL", 2), ("STL", 10)]
    assert len(read_records(tmp_path, method=["EW", "DB-MTL"], seed=(2, 3))) == 2
    assert read_records(tmp_path, scale="paper") == [] == read_records(tmp_path / "nowhere")
    assert (
        len(read_records(tmp_path, hyper={})) == 5
        and read_records(tmp_path, hyper={"beta": 1}) == []
    )
    with pytest.raises(ValueError, match="did you mean 'seed'"):
        read_records(tmp_path, seeds=1)


@pytest.mark.parametrize("damage", ["cut", "empty", "other", "edited", "state"])
def test_a_damaged_record_names_its_file(tmp_path, damage):
    path = write_record(made(), tmp_path)
    record = json.loads(path.read_text())
    if damage == "edited":
        record["config"]["seed"] = 7
    if damage == "state":
        record["state"] = "great"
    text = {"cut": path.read_text()[:-9], "empty": "", "other": "[]"}.get(
        damage, json.dumps(record)
    )
    path.write_text(text)
    with pytest.raises(ValueError, match="delete it and run again") as caught:
        read_record(path)
    assert path.name in str(caught.value)
    with pytest.warns(UserWarning, match=f"{re.escape(path.name)} is damaged and left out"):
        assert read_records(tmp_path) == []


def spoil(record, *place, value=None, drop=False):
    """A deep copy with another value at a place of nested dictionaries and lists, or without it."""
    changed = copy.deepcopy(record)
    inner = changed
    for name in place[:-1]:
        inner = inner[name]
    if drop:
        del inner[place[-1]]
    else:
        inner[place[-1]] = value
    return changed


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The file of a trained run, and what it holds; to be copied before it is changed."""
    folder = tmp_path_factory.mktemp("trained")
    train("toy", "EW", out=folder, monitor_every=6)
    (path,) = folder.glob("*/*.json")
    return path, json.loads(path.read_text())


def in_its_place(folder, trained):
    """Where a copy of the record belongs."""
    path = folder / "toy" / trained[0].name
    path.parent.mkdir(exist_ok=True)
    return path


CHANGES = {
    "another number": {"place": ("curves", "test", "unit", "MAE", 1), "value": 0.125},
    "another selection": {
        "place": ("selected", "best validation epoch", "test", "unit", "MAE"),
        "value": 0.125,
    },
    "NaN": {"place": ("curves", "test", "unit", "MAE", 1), "value": float("nan")},
    "null": {"place": ("curves", "train", "unit", 0)},
    "infinite": {"place": ("floors", "test", "small", "MAE"), "value": float("inf")},
    "a text": {"place": ("curves", "train", "unit", 0), "value": "0.5"},
    "no curves": {"place": ("curves",), "drop": True},
    "no floors": {"place": ("floors",), "drop": True},
    "no monitors": {"place": ("monitors",), "drop": True},
    "no steps": {"place": ("steps",), "drop": True},
    "no floor on validation": {"place": ("floors", "validation", "small"), "drop": True},
    "not at its end": {"place": ("step",), "value": 17},
    "nothing selected": {"place": ("selected",), "value": {}},
    "no test of a task": {"place": ("curves", "test", "large"), "drop": True},
    "no metric": {"place": ("curves", "validation", "large", "MAE"), "drop": True},
    "a short column": {"place": ("curves", "train", "unit", 2), "drop": True},
    "a short monitor": {"place": ("monitors", "norms", "unit", 2), "drop": True},
    "no epochs": {"place": ("curves", "epochs"), "value": []},
    "two epochs exchanged": {"place": ("curves", "epochs"), "value": [2, 1, 3]},
}
FINITE = {"another number", "another selection"}  # what only a checksum can notice


@pytest.mark.parametrize("change", CHANGES)
def test_a_record_that_was_changed_is_damaged(tmp_path, trained, change):
    path = in_its_place(tmp_path, trained)
    changes = CHANGES[change].copy()
    path.write_text(json.dumps(spoil(trained[1], *changes.pop("place"), **changes)))
    with pytest.raises(DamagedRecord, match=re.escape(path.name)):
        read_record(path)
    with pytest.warns(UserWarning, match="damaged and does not count"):
        assert find_record(trained[1]["config"], tmp_path) is None


@pytest.mark.parametrize("change", [change for change in CHANGES if change not in FINITE])
def test_a_record_of_before_checksums_must_be_complete(tmp_path, trained, change):
    legacy = spoil(trained[1], "checksum", drop=True)
    path = in_its_place(tmp_path, trained)
    path.write_text(json.dumps(legacy))
    assert read_record(path) == legacy
    changes = CHANGES[change].copy()
    path.write_text(json.dumps(spoil(legacy, *changes.pop("place"), **changes)))
    with pytest.raises(DamagedRecord, match=re.escape(path.name)):
        read_record(path)


def test_a_flipped_bit_in_any_line_is_noticed(tmp_path, trained):
    content = trained[0].read_bytes()
    lines = content.splitlines(keepends=True)
    path = in_its_place(tmp_path, trained)
    position = 0
    for line in lines:
        middle = position + len(line.rstrip(b",\n")) - 2  # within the value, or the only bracket
        position += len(line)
        if len(line) < 4:
            continue
        changed = bytearray(content)
        changed[middle] ^= 1
        path.write_bytes(bytes(changed))
        with pytest.raises(DamagedRecord):
            read_record(path)


def test_gaps_in_monitors_are_no_damage(tmp_path, trained):
    """A gradient that vanished has no cosine."""
    gap = spoil(trained[1], "monitors", "cosines", "unit|large", 1)
    del gap["checksum"]
    assert read_record(write_record(gap, tmp_path)) == gap
    path = in_its_place(tmp_path, trained)
    path.write_text(json.dumps(gap))
    assert read_record(path) == gap


def test_a_damaged_file_is_kept_when_its_record_is_written_anew(tmp_path, trained):
    record = read_record(trained[0])
    path = write_record(record, tmp_path)
    for count in (1, 2):
        path.write_text(f"damage {count}")
        assert write_record(record, tmp_path) == path and read_record(path) == record
    kept = {file.name: file.read_text() for file in path.parent.iterdir() if file != path}
    assert kept == {
        f"{path.name}.damaged": "damage 1",
        f"{path.name}.damaged-2": "damage 2",
    }
    write_record(record, tmp_path)
    assert len(list(path.parent.iterdir())) == 3


def test_a_damaged_record_does_not_hide_the_others(tmp_path):
    for seed in (0, 1, 2):
        path = write_record(made(seed=seed), tmp_path)
    path.write_text("{")
    with pytest.warns(UserWarning, match=f"{re.escape(path.name)} is damaged and left out"):
        assert [r["config"]["seed"] for r in read_records(tmp_path)] == [0, 1]


def test_a_damaged_file_does_not_hide_the_record_of_other_data(tmp_path):
    paths = sorted(write_record(made(data=data), tmp_path) for data in ("d", "e"))
    whole = read_record(paths[1])
    paths[0].write_text("{")
    with pytest.warns(UserWarning, match=f"{re.escape(paths[0].name)} is damaged"):
        assert find_record(whole["config"], tmp_path) == whole


def test_committed_records_are_whole():
    records, damaged = scan_records(ROOT / "figures/runs")
    assert records and damaged == []


def test_a_float_that_is_not_finite_becomes_null():
    assert round_numbers([float("nan"), float("-inf"), 1.23456789e-12]) == [None, None, 1.23457e-12]


# ----------------------------------------------------------------------------------------- thinning


def long_record(epochs=300, tasks=11, monitors=0):
    names = [f"task_{t}" for t in range(tasks)]
    column = [0.123456 + i / 7 for i in range(epochs)]
    curves = {"epochs": list(range(1, epochs + 1)), "train": {n: column for n in names}}
    for split in ("validation", "test"):
        curves[split] = {n: {"MAE": column} for n in names}
    watched = {"steps": list(range(monitors)), "norms": {n: [0.1234] * monitors for n in names}}
    best = {
        "best validation epoch": {"epoch": 138},
        "average of the last ten epochs": {"epochs": 10},
    }
    return round_numbers(made(curves=curves, monitors=watched, selected=best))


@pytest.mark.parametrize("monitors", [0, 2000])
def test_a_long_record_is_thinned_below_60_kb_and_says_so(tmp_path, monitors):
    path = write_record(long_record(monitors=monitors), tmp_path)
    record = read_record(path)
    assert 20_000 < path.stat().st_size <= 60_000
    assert record["thinned"]["curves"] > 1 and (record["thinned"]["monitors"] > 1) == (monitors > 0)
    epochs = record["curves"]["epochs"]
    assert epochs[0] == 1 and 138 in epochs and epochs[-10:] == list(range(291, 301))
    column = record["curves"]["test"]["task_3"]["MAE"]
    assert column == [round_numbers(0.123456 + (e - 1) / 7) for e in epochs]


@pytest.mark.parametrize("epochs", [241, 242, 243, 244, 299, 300])
def test_the_last_ten_epochs_survive_thinning(epochs):
    """Wherever the stride falls: 300 epochs and a stride of two would hide a lost tenth."""
    record = long_record(epochs=epochs)
    record["selected"] = {"average of the last ten epochs": {"epochs": 10}}
    small = thin(record, limit=40_000)
    stride = small["thinned"]["curves"]
    last_ten = range(epochs - 9, epochs + 1)
    expected = sorted({*range(1, epochs + 1, stride), *last_ten})
    assert stride > 1 and small["curves"]["epochs"] == expected
    column = small["curves"]["train"]["task_0"]
    assert column == [record["curves"]["train"]["task_0"][epoch - 1] for epoch in expected]


@pytest.mark.parametrize("count", [17, 40, 1000])
def test_monitors_keep_every_look_of_their_stride(count):
    record = made(monitors=long_record(epochs=1, monitors=count)["monitors"], note="x" * 800)
    for limit in (2500, 6000):
        small = thin(record, limit=limit)
        stride = small["thinned"]["monitors"]
        assert small["monitors"]["steps"] == list(range(0, count, stride))
        columns = small["monitors"]["norms"].values()
        assert {len(column) for column in columns} == {-(-count // stride)}


def test_monitors_give_way_down_to_sixteen_looks_before_curves_do():
    record = long_record(epochs=200, monitors=2000)
    small = thin(record, limit=40_000)
    assert small["thinned"]["curves"] > 1
    assert 8 < len(small["monitors"]["steps"]) <= 16


def test_epochs_that_stl_chose_survive_thinning():
    record = long_record()
    record["selected"]["best validation epoch"]["epoch"] = {
        "task_0": 52,
        "task_1": 138,
        "task_2": 200,
    }
    assert {52, 138, 200} <= set(thin(record)["curves"]["epochs"])


def test_a_short_record_is_not_thinned():
    record = long_record(epochs=20)
    assert thin(record) == record | {"thinned": {"curves": 1, "monitors": 1}}


def test_the_checksum_counts_among_the_bytes_of_a_record(tmp_path):
    record = long_record(epochs=100)
    size = len(encode_record(record | {"thinned": {"curves": 1, "monitors": 1}, "note": ""}))
    record["note"] = "x" * (60_000 - size)  # it fits, but for the checksum
    assert thin(record)["thinned"]["curves"] == 1
    path = write_record(record, tmp_path)
    assert path.stat().st_size <= 60_000 and read_record(path)["thinned"]["curves"] == 2


def test_a_record_that_cannot_fit_raises():
    with pytest.raises(ValueError, match="even when thinned"):
        thin(made(note="x" * 70_000))


def test_a_record_has_a_line_a_field():
    record = long_record(epochs=3)
    assert len(encode_record(record).decode().splitlines()) == len(record) + 2


# ------------------------------------------------------------------------------------------- places


def test_smoke_goes_to_an_ignored_folder_and_other_scales_to_figures(monkeypatch, tmp_path):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    assert project_root() == tmp_path
    assert (
        runs_folder("smoke") == tmp_path / "out/smoke/runs"
        and figures_folder("smoke") == tmp_path / "out/smoke/figures"
    )
    for scale in ("cpu", "gpu", "paper"):
        assert (
            runs_folder(scale) == tmp_path / "figures/runs"
            and figures_folder(scale) == tmp_path / "figures"
        )


def test_the_project_is_found_from_inside_and_only_there(monkeypatch, tmp_path):
    monkeypatch.delenv("DBMTL_OUT", raising=False)
    root = Path(__file__).resolve().parents[2]
    assert project_root(root / "nbs") == root
    (tmp_path / "settings.ini").write_text("[DEFAULT]\nlib_name = other\n")
    with pytest.raises(FileNotFoundError, match="set DBMTL_OUT"):
        project_root(tmp_path)


def test_git_ignores_smoke_records(monkeypatch):
    monkeypatch.delenv("DBMTL_OUT", raising=False)
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        pytest.skip("no git checkout")
    commands = [
        ["git", "check-ignore", "-q", str(root / name)]
        for name in ("out/smoke/runs/a.json", "figures/runs/a.json")
    ]
    ignored = [subprocess.run(command, cwd=root).returncode == 0 for command in commands]
    assert ignored == [True, False]


def test_commit_is_none_where_git_knows_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", os.fspath(tmp_path))
    assert records.commit() is None


def test_commit_is_dirty_where_the_code_differs_and_only_there(monkeypatch, tmp_path):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    (tmp_path / "dbmtl").mkdir()
    code, figure = tmp_path / "dbmtl/train.py", tmp_path / "figure.svg"
    for path in (code, figure):
        path.write_text("one")
    who = ["-c", "user.name=n", "-c", "user.email=n@example.org", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], [*who, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *words], cwd=tmp_path, check=True, capture_output=True)
    figure.write_text("two")
    assert len(records.commit()) == 12
    code.write_text("two")
    assert records.commit().endswith("-dirty")


# ------------------------------------------------------------------------------------------- floors


FLOORED = {
    "state": "finished",
    "directions": {"a": {"MAE": "down"}, "b": {"Acc": "up", "IoU": "up"}},
    "floors": {"test": {"a": {"MAE": 2.0}, "b": {"Acc": 50.0, "IoU": 20.0}}},
    "selected": {
        "best validation epoch": {
            "epoch": 3,
            "test": {"a": {"MAE": 1.8}, "b": {"Acc": 51.0, "IoU": 21.0}},
        },
        "average of the last ten epochs": {
            "epochs": 10,
            "test": {"a": {"MAE": 2.2}, "b": {"Acc": 60.0, "IoU": 20.0}},
        },
    },
}


def test_above_floor_takes_the_mean_gain_of_a_task():
    # a: (2 - 1.8) / 2 = 10 %; b: (2 % + 5 %) / 2 = 3.5 %
    assert above_floor(FLOORED) == {"a": True, "b": False}
    assert above_floor(FLOORED, margin=0.034) == {"a": True, "b": True}
    assert above_floor(FLOORED, margin=0.101) == {"a": False, "b": False}
    # a: -10 %; b: (20 % + 0) / 2 = 10 %
    assert above_floor(FLOORED, protocol="last ten") == {"a": False, "b": True}


def test_above_floor_with_a_floor_of_zero():
    record = copy.deepcopy(FLOORED)
    record["floors"]["test"]["b"] = {"Acc": 0.0, "IoU": 0.0}
    assert above_floor(record)["b"]
    for selection in record["selected"].values():
        selection["test"]["b"] = {"Acc": 0.001, "IoU": 0.0}  # small, and more than nothing
    assert above_floor(record)["b"]


def test_above_floor_with_a_floor_below_zero():
    record = {
        "selected": {"best validation epoch": {"test": {"a": {"R2": 0.1}, "b": {"R2": -0.6}}}},
        "floors": {"test": {"a": {"R2": -0.5}, "b": {"R2": -0.5}}},
        "directions": {"a": {"R2": "up"}, "b": {"R2": "up"}},
    }
    assert above_floor(record) == {"a": True, "b": False}


ON_TEST = {
    "state": "finished",
    "selected": {
        "best test epoch": {"epoch": 2, "test": {"a": {"MAE": 0.1}}},
        "average of the last ten epochs": {"epochs": 3, "test": {"a": {"MAE": 1.9}}},
    },
    "floors": {"test": {"a": {"MAE": 2.0}}},
    "directions": {"a": {"MAE": "down"}},
}


def test_a_choice_on_test_is_no_number():
    assert selected(ON_TEST) is None and selected(ON_TEST, "best") is None
    assert selected(ON_TEST, "last ten") == {"a": {"MAE": 1.9}}
    # by the last ten in its place: 5 %, not the 95 % of the epoch chosen on test
    assert above_floor(ON_TEST, margin=0.06) == {"a": False}
    assert above_floor(ON_TEST, margin=0.04) == {"a": True}


FIRST_PROTOCOL = {
    "cityscapes": "epochs selected on test",
    "nyuv2": "epochs selected on test",
    "nyuv2-segnet": "epochs selected on test",
    "nyuv2-sgd": "epochs selected on test",
    "office31": "STL by epochs",
    "office31-sgd": "STL by epochs",
    "officehome": "STL by epochs",
    "pacs": "STL by epochs",
    "qm9": "",
    "toy": "",
}


@pytest.mark.parametrize("name", FIRST_PROTOCOL)
def test_what_the_protocols_of_the_benchmarks_are(name):
    note = FIRST_PROTOCOL[name]
    config = configuration(name, "EW", 0, "smoke")
    assert config["protocol"] == (2 if note else 1)
    assert protocol_note({"config": config}) == ""
    assert protocol_note({"config": config | {"protocol": 1}}) == note


def test_records_can_be_read_by_their_protocol(tmp_path):
    write_record(made("EW"), tmp_path)
    assert len(read_records(tmp_path, protocol=1)) == 1
    assert read_records(tmp_path, protocol=2) == []


def test_committed_records_of_the_first_protocol_are_read():
    records = read_records(runs_folder("paper"), benchmark=["nyuv2", "cityscapes"], protocol=1)
    assert all(protocol_note(record) == "epochs selected on test" for record in records)
    on_test = [record for record in records if "best test epoch" in record["selected"]]
    assert all(selected(record) is None for record in on_test)


def test_selected_refuses_an_unknown_protocol_and_an_unfinished_run():
    assert selected(FLOORED, "last ten")["a"] == {"MAE": 2.2}
    with pytest.raises(ValueError, match="unknown protocol .worst."):
        selected(FLOORED, "worst")
    with pytest.raises(ValueError, match="diverged"):
        selected({"selected": {}, "state": "diverged"})


def test_a_configuration_keeps_all_its_digits(tmp_path):
    record = made("DB-MTL", hyper={"beta": 1 / 3}, extra=1 / 3)
    again = read_record(write_record(record, tmp_path))
    assert again["config"]["hyper"]["beta"] == 1 / 3 and again["extra"] == 0.333333
    assert find_record(record["config"], tmp_path) == again


def test_a_trained_run_with_a_third_is_found_again(tmp_path):
    first = train("toy", "DB-MTL", out=tmp_path, hyper={"beta": 1 / 3})
    assert read_record(next(tmp_path.glob("*/*.json")))["curves"] == first["curves"]


def test_monitors_are_thinned_to_one_look_before_giving_up():
    wide = {"steps": list(range(16)), "norms": {str(t): [0.1234] * 16 for t in range(1000)}}
    small = thin(made(monitors=wide))
    assert small["monitors"]["steps"][0] == 0 and len(small["monitors"]["steps"]) < 16
    with pytest.raises(ValueError, match="even when thinned"):
        thin(made(monitors={"steps": [0], "norms": {str(t): [0.1234] for t in range(10_000)}}))

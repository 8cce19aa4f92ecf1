"""Many runs: what is pending, time, processes, interruptions and names."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace

import pytest

from dbmtl.benchmarks.toy import toy
from dbmtl.core.balancer import Balancer
from dbmtl.data.image_store import DamagedStore
from dbmtl.experiments import run as lab
from dbmtl.experiments.metrics import delta_p
from dbmtl.experiments.records import read_records, write_record
from dbmtl.experiments.replay import replay_all
from dbmtl.experiments.run import check_names, main, metrics_table, plan, run_all, run_table
from dbmtl.experiments.train import train


def statuses(records):
    return [r["status"] for r in records]


def no_convergence(balancer, losses, **options):
    raise RuntimeError("no convergence")


def command(*arguments):
    return [sys.executable, "-m", "dbmtl.run", *map(str, arguments)]


# ------------------------------------------------------------------------------------------ pending


def test_finished_runs_are_not_run_again_unless_asked(tmp_path):
    first = run_all("toy", ["EW", "STL"], [0, 1], out=tmp_path)
    assert [(r["config"]["method"], r["config"]["seed"]) for r in first] == [
        ("EW", 0),
        ("STL", 0),
        ("EW", 1),
        ("STL", 1),
    ]
    assert [r["steps_now"] for r in first] == [18, 54, 18, 54] and set(statuses(first)) == {
        "done now"
    }
    second = run_all("toy", ["DB-MTL", "EW", "STL"], [1], out=tmp_path)
    assert statuses(second) == ["done now", "already there", "already there"]
    assert [r["steps_now"] for r in second] == [18, 0, 0]
    assert statuses(run_all("toy", "EW", [0], out=tmp_path, fresh=True)) == ["done now"]
    assert len(read_records(tmp_path)) == 5


def test_other_hyperparameters_are_another_run(tmp_path):
    assert statuses(run_all("toy", ["DB-MTL"], out=tmp_path)) == ["done now"]
    assert statuses(run_all("toy", ["DB-MTL"], out=tmp_path, hyper={"DB-MTL": {"beta": 0.1}})) == [
        "done now"
    ]
    assert statuses(run_all("toy", ["DB-MTL"], out=tmp_path, hyper={"beta": 0.1})) == [
        "already there"
    ]


def test_records_without_the_monitors_asked_for_do_not_count(tmp_path):
    run_all("toy", ["EW", "STL"], out=tmp_path)
    watched = run_all("toy", ["EW", "STL"], out=tmp_path, monitor_every=6)
    assert statuses(watched) == ["done now", "already there"] and watched[0]["monitors"][
        "steps"
    ] == [0, 6, 12]
    other_interval = run_all("toy", ["EW"], out=tmp_path, monitor_every=4)
    assert statuses(other_interval) == ["already there"]
    assert statuses(run_all("toy", ["EW"], out=tmp_path)) == ["already there"]


def test_when_all_is_done_no_data_are_loaded(tmp_path):
    run_all("toy", ["EW"], out=tmp_path)

    def missing(*_):
        raise FileNotFoundError("no data here")

    gone = replace(toy, load=missing)
    assert statuses(run_all(gone, ["EW"], out=tmp_path)) == ["already there"]
    with pytest.raises(FileNotFoundError):
        run_all(gone, ["EW", "STL"], out=tmp_path)


def test_data_are_loaded_once_a_seed(tmp_path):
    loads = []
    counted = replace(toy, load=lambda *args: loads.append(args[2]) or toy.load(*args))
    run_all(counted, ["EW", "DB-MTL"], [3, 4], out=tmp_path)
    assert loads == [3, 4]


def test_a_benchmark_that_knows_its_hash_notices_other_data(tmp_path):
    record = run_all("toy", ["EW"], out=tmp_path)[0]
    same = replace(toy, data_hash=lambda scale, seed: record["data"]["hash"])
    other = replace(toy, data_hash=lambda scale, seed: "0" * 64)
    assert plan(same, ["EW"], [0], "smoke", tmp_path)[0].record is not None
    assert plan(other, ["EW"], [0], "smoke", tmp_path)[0].record is None


def test_records_of_other_data_are_told_in_one_sentence(tmp_path):
    record = run_all("toy", ["EW"], out=tmp_path)[0]
    data = replace(toy.load(toy.scale("smoke")), hash="f" * 64)
    other = replace(toy, load=lambda *_: data, data_hash=lambda scale, seed: data.hash)
    with pytest.warns(lab.OtherData, match="1 of 2 runs have a record in .* made from other data"):
        results = run_all(other, ["EW", "DB-MTL"], out=tmp_path)
    assert statuses(results) == ["done now", "done now"]
    assert results[0]["identity"] != record["identity"]
    assert statuses(run_all(other, ["EW", "DB-MTL"], out=tmp_path)) == ["already there"] * 2
    assert statuses(run_all("toy", ["EW"], out=tmp_path)) == ["already there"]


def test_a_learning_rate_is_a_setting_of_every_run(tmp_path, capsys):
    words = ["--benchmark", "toy", "--methods", "EW,STL,EW(learning_rate=0.01)"]
    words += ["--out", str(tmp_path)]
    assert lab.main([*words, "--lr", "3e-4"]) == 0
    records = read_records(tmp_path)
    rates = [(r["config"]["method"], r["config"]["hyper"]["learning_rate"]) for r in records]
    assert sorted(rates) == [("EW", 3e-4), ("EW", 0.01), ("STL", 3e-4)]
    assert all(r["config"]["scale"]["learning_rate"] == 1e-3 for r in records)
    with pytest.raises(SystemExit):
        lab.main([*words, "--lr", "-1"])
    assert "learning_rate must be a finite number" in capsys.readouterr().err


def test_the_scale_s_own_learning_rate_is_no_setting(tmp_path):
    run_all("toy", ["EW"], out=tmp_path)
    results = run_all("toy", ["EW(learning_rate=0.001)", "EW"], out=tmp_path)
    assert statuses(results) == ["already there"]


@pytest.mark.full
def test_processes_get_the_learning_rate(tmp_path):
    (result,) = run_all("toy", ["EW"], out=tmp_path, jobs=2, hyper={"learning_rate": 3e-4})
    assert result["status"] == "done now"
    assert read_records(tmp_path)[0]["config"]["hyper"] == {"learning_rate": 3e-4}


@pytest.fixture
def failed(tmp_path, monkeypatch):
    """The record of a method that raised, in a folder whose parent is the test's own."""
    with monkeypatch.context() as patch:
        patch.setattr(Balancer, "backward", no_convergence)
        (record,) = run_all("toy", ["EW"], out=tmp_path / "runs")
    assert record["status"] == "failed"
    return record


def again(tmp_path):
    return statuses(run_all("toy", ["EW"], out=tmp_path / "runs"))


def test_failed_runs_are_tried_again_after_the_code_changed(tmp_path, failed, monkeypatch):
    assert again(tmp_path) == ["already there"]
    monkeypatch.setattr(lab, "commit", lambda: "another")
    assert again(tmp_path) == ["done now"]


def test_a_replay_of_a_failed_run_says_more_than_its_commit(tmp_path, failed, monkeypatch):
    """The mended method does not fail again, and the replay knows; a commit alone says nothing."""
    folder = tmp_path / "runs"
    monkeypatch.setattr(lab, "commit", lambda: "another")
    with monkeypatch.context() as patch:
        patch.setattr(Balancer, "backward", no_convergence)
        (found,) = replay_all([failed], folder).values()
    assert found["outcome"] == "exact" and again(tmp_path) == ["already there"]
    monkeypatch.setattr(lab, "commit", lambda: failed["commit"])
    (found,) = replay_all([failed], folder).values()
    assert found["first"]["recorded"] == "failed at step 0"
    assert again(tmp_path) == ["done now"]


def test_a_diverged_run_is_not_tried_again_by_another_commit(tmp_path, monkeypatch):
    record = run_all("toy", ["EW"], out=tmp_path)[0]
    del record["steps_now"], record["status"]
    write_record(record | {"state": "diverged"}, tmp_path)
    monkeypatch.setattr(lab, "commit", lambda: "another")
    assert statuses(run_all("toy", ["EW"], out=tmp_path)) == ["already there"]


def test_a_diverged_run_is_a_result(tmp_path):
    wild = replace(
        toy,
        tasks=(
            replace(toy.tasks[0], loss=lambda p, t: (p - t).square().mean() * float("inf")),
            *toy.tasks[1:],
        ),
    )
    records = run_all(wild, ["EW", "STL"], out=tmp_path)
    assert statuses(records) == ["diverged", "diverged"]
    assert "the loss of task 'unit' is inf" in run_table(records)
    assert statuses(run_all(wild, ["EW"], out=tmp_path)) == ["already there"]


# --------------------------------------------------------------------------------------------- time


def test_a_budget_stops_in_the_middle_and_the_next_call_goes_on(tmp_path):
    whole = run_all("toy", ["EW", "DB-MTL"], [0], out=tmp_path / "whole")
    calls = iter(range(10_000))
    part = run_all(
        "toy", ["EW", "DB-MTL"], [0], out=tmp_path / "parts", stop=lambda: next(calls) >= 8
    )
    assert statuses(part) == [f"stopped at step 7 of {part[0]['steps']}", "pending"]
    assert [r["steps_now"] for r in part] == [7, 0]
    rest = run_all("toy", ["EW", "DB-MTL"], [0], out=tmp_path / "parts", budget="10m")
    assert statuses(rest) == ["done now"] * 2 and [r["steps_now"] for r in rest] == [11, 18]
    assert [r["curves"] for r in rest] == [r["curves"] for r in whole]


def test_no_time_leaves_all_but_a_step_pending(tmp_path):
    records = run_all("toy", ["EW", "STL"], out=tmp_path, budget=0.0001)
    assert statuses(records) == ["stopped at step 1 of 18", "pending"]
    assert not list(tmp_path.glob("*/*.json")) and "pending" in run_table(records)


def test_repeated_calls_with_too_little_time_come_to_the_end(tmp_path):
    for step in range(1, 18):
        (record,) = run_all("toy", ["EW"], out=tmp_path, budget=0.0001)
        assert record["status"] == f"stopped at step {step} of 18"
    assert statuses(run_all("toy", ["EW"], out=tmp_path, budget=0.0001)) == ["done now"]


@pytest.mark.full
def test_a_process_with_too_little_time_takes_a_step_too(tmp_path):
    for step in (1, 2):
        records = run_all("toy", ["EW", "STL", "DB-MTL"], out=tmp_path, budget=0.0001, jobs=2)
        expected = [f"stopped at step {step} of 18", f"stopped at step {step} of 54", "pending"]
        assert statuses(records)[0] == expected[0] and statuses(records)[2] == "pending"
        assert statuses(records)[1] in (expected[1], "pending")


def test_a_method_that_a_network_cannot_run_does_not_end_the_others(tmp_path):
    refused, done = run_all("nyuv2-segnet", ["MGDA-UB", "EW"], out=tmp_path)
    assert refused["state"] == refused["status"] == "failed" and done["state"] == "finished"
    assert "cannot run on nyuv2-segnet" in refused["reason"] and "one tensor" in refused["reason"]
    assert "cannot run on nyuv2-segnet" in run_table([refused, done])
    assert [path.parent.name for path in tmp_path.glob("*/*.json")] == ["nyuv2-segnet"]


def test_an_interrupted_fresh_run_goes_on_though_its_old_record_is_there(tmp_path):
    run_all("toy", ["EW"], out=tmp_path)
    calls = iter(range(100))
    assert statuses(
        run_all("toy", ["EW"], out=tmp_path, fresh=True, stop=lambda: next(calls) == 5)
    ) == ["stopped at step 4 of 18"]
    again = run_all("toy", ["EW"], out=tmp_path)
    assert again[0]["steps_now"] == 14 and statuses(run_all("toy", ["EW"], out=tmp_path)) == [
        "already there"
    ]


def test_a_fresh_run_takes_what_an_attempt_of_its_own_has_left(tmp_path):
    def statuses_since(since):
        return statuses(run_all("toy", ["EW"], out=tmp_path, fresh=True, since=since))

    run_all("toy", ["EW"], out=tmp_path)
    assert statuses_since(None) == ["done now"]
    assert statuses_since(time.time() + 3600) == ["done now"]  # the record is older
    assert statuses_since(time.time() - 3600) == ["already there"]


# -------------------------------------------------------------------------------------------- names


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--benchmark": "toyy"}, "did you mean 'toy'"),
        ({"--methods": "EW,DBMTL"}, "did you mean 'DB-MTL'"),
        ({"--methods": "EW,"}, "empty name"),
        ({"--seeds": "0,a"}, "--seeds takes whole numbers"),
        ({"--scale": "smok"}, "did you mean 'smoke'"),
        ({"--seeds": "0,one"}, "one"),
        ({"--budget": "soon"}, "like 90s, 25m or 1h30m"),
        ({"--hyper": "beta"}, "METHOD:key=value"),
        ({"--hyper": "DB-MTL:betta=1"}, "betta"),
        ({"--hyper": "DB-MTL:beta=abc"}, "beta"),
        ({"--methods": "DB-MTL(beta=abc)"}, "beta"),
        ({"--hyper": "DBMTL:beta=1"}, "did you mean 'DB-MTL'"),
        ({"--device": "cudda"}, "cudda"),
        (
            {"--methods": "DB-MTL(check=off)"},
            "no setting 'check'; its settings: eps, alpha, weights, shrinkage, beta",
        ),
        ({"--hyper": "DB-MTL:grads=loop"}, "no setting 'grads'"),
        ({"--hyper": "check=off"}, "EW has no setting 'check'; its settings: head_losses"),
        ({"--methods": "DB-MTL(num_tasks=3)"}, "no setting 'num_tasks'"),
        ({"--methods": "DB-MTL(shared=1)"}, "no setting 'shared'"),
        ({"--methods": "DB-MTL(model=1)"}, "no setting 'model'"),
        ({"--methods": "DB-MTL(level=features)"}, "no setting 'level'"),
        ({"--methods": "RLW(seed=x)"}, "RLW does not take seed='x'"),
        ({"--methods": "DB-MTL(beta=abc)"}, "beta must be a finite number"),
        ({"--seeds": "-1"}, "seed must be a whole number from 0, got -1"),
        ({"--seeds": "4294967296"}, "seed must be below 2**32, got 4294967296"),
        ({"--seeds": "9" * 5000}, "--seeds takes whole numbers"),
        ({"--monitor-every": "-3"}, "monitor-every must be a whole number from 0, got -3"),
        ({"--monitor-every": "x"}, "monitor-every must be a whole number from 0, got 'x'"),
        ({"--jobs": "0"}, "jobs must be a whole number from 1, got 0"),
        ({"--jobs": "-2"}, "jobs must be a whole number from 1, got -2"),
        ({"--checkpoint-seconds": "-1"}, "--checkpoint-seconds must be a finite number at least 0"),
        ({"--checkpoint-seconds": "nan"}, "--checkpoint-seconds must be a finite number"),
        ({"--out": ""}, "--out is empty: name a folder"),
        ({"--checkpoints": " "}, "--checkpoints is empty: name a folder"),
    ],
)
def test_wrong_options_are_refused_before_training(change, message, tmp_path, capsys):
    options = {
        "--benchmark": "toy",
        "--methods": "EW,DB-MTL",
        "--out": str(tmp_path / "new"),
    } | change
    with pytest.raises(SystemExit) as caught:
        main([word for pair in options.items() for word in pair])
    assert caught.value.code == 2 and message in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("has_cuda", [False, True])
def test_large_scales_go_to_a_gpu_where_there_is_one(monkeypatch, has_cuda):
    monkeypatch.setattr(lab.torch.cuda, "is_available", lambda: has_cuda)
    large = "cuda" if has_cuda else "cpu"
    devices = {scale: lab._device_for(scale) for scale in ("smoke", "cpu", "gpu", "paper")}
    assert devices == {"smoke": "cpu", "cpu": "cpu", "gpu": large, "paper": large}


def test_a_missing_cuda_device_is_said_so(monkeypatch):
    monkeypatch.setattr(lab.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device; use cpu"):
        check_names("toy", ["EW"], "smoke", device="cuda")


# --------------------------------------------------------------------------------- damage and disks


TOY = ["--benchmark", "toy", "--methods"]


def test_one_damaged_record_does_not_block_the_sweep(tmp_path, capsys):
    whole = run_all("toy", ["EW", "DB-MTL", "STL"], out=tmp_path)
    (path,) = tmp_path.glob("toy/smoke-DB-MTL-*.json")
    content = json.loads(path.read_text())
    content["curves"]["test"]["unit"]["MAE"][0] = 0.125
    path.write_text(json.dumps(content))
    with pytest.warns(UserWarning, match=f"{path.name} is damaged and does not count .*checksum"):
        code = main([*TOY, "EW,DB-MTL,STL", "--out", str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert code == 0 and ["already there" in line for line in lines[1:4]] == [True, False, True]
    assert "done now" in lines[2]
    kept = path.with_name(path.name + ".damaged")
    assert json.loads(kept.read_text()) == content
    again = run_all("toy", ["EW", "DB-MTL", "STL"], out=tmp_path)
    assert statuses(again) == ["already there"] * 3
    assert [r["curves"] for r in again] == [r["curves"] for r in whole]


@pytest.mark.full
def test_processes_make_a_damaged_record_anew(tmp_path):
    run_all("toy", ["EW", "STL"], out=tmp_path)
    (path,) = tmp_path.glob("toy/smoke-EW-*.json")
    path.write_text(path.read_text()[:-100])
    with pytest.warns(UserWarning, match=f"{path.name} is damaged and does not count"):
        records = run_all("toy", ["EW", "STL"], out=tmp_path, jobs=2)
    assert statuses(records) == ["done now", "already there"]
    assert path.with_name(path.name + ".damaged").exists() and len(read_records(tmp_path)) == 2


@pytest.mark.parametrize("damage", ["truncated", "of another run"])
def test_a_damaged_checkpoint_is_told_in_a_sentence_and_the_others_go_on(
    tmp_path, stopped, capsys, damage
):
    _, path = stopped()
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:-5])
    else:
        _, other = stopped(seed=1)
        other.rename(path)
    arguments = [*TOY, "EW,STL", "--out", str(tmp_path)]
    assert main(arguments) == 1
    shown = capsys.readouterr().out.splitlines()
    assert [line.split()[2] for line in shown[1:3]] == ["failed", "done"]
    assert path.name in shown[3] and "use --fresh" in shown[3]
    assert main([*arguments, "--fresh"]) == 0


@pytest.mark.parametrize("where", ["a file", "below a file", "a read-only folder"])
def test_a_folder_that_takes_no_record_is_told_before_training(
    tmp_path, capsys, monkeypatch, where
):
    out = tmp_path / "out"
    out.write_text("in the way")
    if where == "below a file":
        out = out / "deeper"
    if where == "a read-only folder":  # which root may write to: the file system says no
        out = tmp_path

        def refuse(*_, **options):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))

        monkeypatch.setattr(lab.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(lab, "train", lambda *_, **options: pytest.fail("trained"))
    with pytest.raises(SystemExit) as caught:
        main([*TOY, "EW", "--out", str(out)])
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and f"records cannot be written to {out}: " in errors
    assert errors.count("\n") == 1


def test_a_folder_that_takes_no_record_is_read_where_all_are_there(tmp_path, monkeypatch):
    run_all("toy", ["EW"], out=tmp_path)
    monkeypatch.setattr(lab, "_check_writable", lambda folder: pytest.fail("written to"))
    assert statuses(run_all("toy", ["EW"], out=tmp_path)) == ["already there"]


def test_damaged_data_without_sources_are_told_in_a_sentence(tmp_path, capsys, monkeypatch):
    def load(*_):
        raise DamagedStore("the prepared data set x is damaged (image.npy): delete that folder")

    damaged = replace(toy, load=load)
    monkeypatch.setattr(lab, "get_benchmark", lambda name: damaged)
    with pytest.raises(SystemExit) as caught:
        main([*TOY, "EW", "--out", str(tmp_path)])
    errors = capsys.readouterr().err
    assert caught.value.code == 2 and errors.count("\n") == 1 and "x is damaged" in errors


def test_a_full_disk_is_told_in_a_sentence(tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(SystemExit) as caught:
        main([*TOY, "EW", "--out", str(tmp_path)])
    errors = capsys.readouterr().err
    assert caught.value.code == 2
    assert f"the record of toy EW seed 0 cannot be written to {tmp_path}: No space" in errors


# ---------------------------------------------------------------------------------------- processes


FATAL = """
import os, signal
replace = os.replace
def dying(source, target):
    replace(source, target)
    if "checkpoints" in str(target) and str(target).endswith(".pt"):
        with open(os.environ["DEATHS"], "a") as file:
            file.write("x")
        if os.path.getsize(os.environ["DEATHS"]) in (3, {second}):
            os.kill(os.getpid(), signal.SIGKILL)
os.replace = dying
"""


def sweep_with_deaths(tmp_path, second, *more):
    """A sweep over two methods, whose process of the second one kills itself at a checkpoint."""
    (tmp_path / "sitecustomize.py").write_text(FATAL.format(second=second))
    places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    variables = os.environ | {"PYTHONPATH": places, "DEATHS": str(tmp_path / "deaths")}
    options = ["--out", tmp_path / "out", "--jobs", "2", "--checkpoint-seconds", "0", *more]
    program = command(*TOY, "DB-MTL", *options)
    return subprocess.run(program, env=variables, capture_output=True, text=True)


@pytest.mark.full
def test_a_killed_process_is_tried_again_from_its_checkpoint(tmp_path):
    (whole,) = run_all("toy", ["DB-MTL"], out=tmp_path / "whole")
    done = sweep_with_deaths(tmp_path, second=0)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "DB-MTL seed 0: done now, 15 steps\n"
    assert done.stdout.splitlines()[1].split() == ["DB-MTL", "0", "done", "now", "15"]
    (record,) = read_records(tmp_path / "out")
    assert record["seconds"]["sessions"] == 2 and record["curves"] == whole["curves"]


@pytest.mark.full
def test_a_killed_fresh_run_goes_on_from_its_checkpoint_too(tmp_path):
    run_all("toy", ["DB-MTL"], out=tmp_path / "out")
    done = sweep_with_deaths(tmp_path, 0, "--fresh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[-1] == "15"


@pytest.mark.full
def test_a_process_killed_twice_is_lost_and_keeps_its_checkpoint(tmp_path):
    done = sweep_with_deaths(tmp_path, second=5)
    assert done.returncode == 1, done.stderr
    assert done.stderr == "DB-MTL seed 0: lost, 0 steps\n"
    row = done.stdout.splitlines()[1]
    assert row.split()[:4] == ["DB-MTL", "0", "lost", "0"]
    assert row.endswith("killed by SIGKILL (tried twice)")
    (rest,) = run_all("toy", ["DB-MTL"], out=tmp_path / "out")
    assert rest["steps_now"] == 18 - 5


@pytest.mark.full
def test_kill_9_of_a_child_does_not_end_the_others(tmp_path, monkeypatch, capsys):
    """Every process of EW is killed from outside; what waits behind it is trained."""
    real, killed = lab._start, []

    def start(run, *arguments):
        child = real(run, *arguments)
        if run.method == "EW":
            subprocess.run(["kill", "-9", str(child.process.pid)], check=True)
            killed.append(child.process.pid)
        return child

    monkeypatch.setattr(lab, "_start", start)
    code = main([*TOY, "EW,DB-MTL,STL", "--jobs", "2", "--out", str(tmp_path)])
    shown = capsys.readouterr()
    rows = [line.split() for line in shown.out.splitlines()[1:4]]
    assert code == 1 and len(killed) == 2 and "Traceback" not in shown.err
    assert [(row[0], row[2]) for row in rows] == [
        ("EW", "lost"),
        ("DB-MTL", "done"),
        ("STL", "done"),
    ]
    assert "killed by SIGKILL (tried twice)" in shown.out
    assert [r["config"]["method"] for r in read_records(tmp_path)] == ["DB-MTL", "STL"]
    monkeypatch.setattr(lab, "_start", real)
    again = run_all("toy", ["EW", "DB-MTL", "STL"], out=tmp_path, jobs=2)
    assert statuses(again) == ["done now", "already there", "already there"]


@pytest.mark.full
def test_a_process_that_ends_in_an_error_is_lost_with_its_last_words(tmp_path, monkeypatch, capfd):
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "if 'EW' in sys.orig_argv:\n"
        "    import os\n"
        "    os.write(2, b'Traceback\\nKeyError: 7\\n')\n"
        "    os._exit(3)\n"
    )
    places = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])
    monkeypatch.setenv("PYTHONPATH", places)
    lost, done = run_all("toy", ["EW", "STL"], out=tmp_path, jobs=2)
    assert (lost["state"], done["status"]) == ("lost", "done now")
    assert lost["reason"] == "ended with exit code 3: KeyError: 7 (tried twice)"
    assert "Traceback\nKeyError: 7" in capfd.readouterr().err


@pytest.mark.full
def test_a_process_that_dies_before_it_can_hear_a_stop_is_pending(tmp_path, monkeypatch):
    real, started = lab._start, []

    def start(*arguments):
        started.append(real(*arguments))
        return started[-1]

    monkeypatch.setattr(lab, "_start", start)
    records = run_all("toy", ["EW", "STL"], out=tmp_path, jobs=2, stop=lambda: bool(started))
    assert [r["state"] for r in records] == ["pending"] * 2 and len(started) == 2


@pytest.mark.full
def test_jobs_give_the_records_of_one_process(tmp_path):
    options = {"hyper": {"DB-MTL": {"beta": 0.1}}, "monitor_every": 9}
    one = run_all("toy", ["EW", "DB-MTL"], out=tmp_path / "one", **options)
    two = run_all("toy", ["EW", "DB-MTL"], out=tmp_path / "two", **options, jobs=2)
    assert statuses(two) == ["done now"] * 2 and [r["steps_now"] for r in two] == [18, 18]
    for a, b in zip(one, two, strict=True):
        assert (a["config"], a["curves"], a["monitors"]) == (
            b["config"],
            b["curves"],
            b["monitors"],
        )
        assert b["threads"] == 1
    assert statuses(run_all("toy", ["EW", "DB-MTL"], out=tmp_path / "two", jobs=2)) == [
        "already there",
        "done now",
    ]


def test_a_worker_gets_whole_paths_and_one_thread(tmp_path, monkeypatch):
    """Another machine has another working directory, and threads set for the parent stay there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    monkeypatch.setenv("MKL_NUM_THREADS", "4")
    told = {}

    class NoProcess:
        returncode = 2

        def __init__(self, line, env, **options):
            told.update(line=line, env=env)

        def poll(self):
            return self.returncode

        def wait(self):
            return self.returncode

    monkeypatch.setattr(lab.subprocess, "Popen", NoProcess)
    monkeypatch.setattr(lab, "find_record", lambda *arguments: None)
    monkeypatch.setattr(lab, "commit", lambda: None)
    with pytest.raises(FileNotFoundError, match="EW seed 0 ended with 2"):
        run_all("toy", "EW", out="records", checkpoints="states", jobs=2)
    options = dict(zip(told["line"][3::2], told["line"][4::2], strict=True))
    assert options["--out"] == str(tmp_path / "records")
    assert options["--checkpoints"] == str(tmp_path / "states")
    assert (told["env"]["OMP_NUM_THREADS"], told["env"]["MKL_NUM_THREADS"]) == ("1", "1")


def test_an_error_of_one_process_ends_the_others(tmp_path, monkeypatch):
    """Nobody is left to hear what they find."""

    class Process:
        def __init__(self, line, **options):
            is_first = "EW" in line
            self.returncode = 2 if is_first else None
            self.signals = []
            processes.append(self)

        def poll(self):
            return self.returncode

        def send_signal(self, number):
            self.signals.append(number)
            self.returncode = -number

        def wait(self):
            assert self.returncode is not None, "waits for a process that goes on for hours"

    processes = []
    monkeypatch.setattr(lab.subprocess, "Popen", Process)
    monkeypatch.setattr(lab, "commit", lambda: None)
    monkeypatch.setattr(lab, "find_record", lambda *arguments: None)
    with pytest.raises(FileNotFoundError, match="EW seed 0 ended with 2"):
        run_all("toy", ["EW", "DB-MTL"], out=tmp_path, jobs=2)
    assert [process.signals for process in processes] == [[], [signal.SIGTERM]]


@pytest.mark.parametrize(
    ("code", "state"), [(None, "pending"), (0, "pending"), (-15, "pending"), (1, "lost")]
)
def test_a_worker_that_leaves_no_report_has_failed_only_where_its_code_says_so(
    tmp_path, code, state
):
    (run,) = plan(toy, ["EW"], [0], "smoke", tmp_path)
    outcome = {"host": "there", "code": code, "report": None, "errors": ""}
    assert lab._returned(run, tmp_path, outcome)["state"] == state


def test_a_record_of_another_machine_is_waited_for_and_not_for_ever(tmp_path, monkeypatch):
    (run,) = plan(toy, ["EW"], [0], "smoke", tmp_path)
    report = {"state": "finished", "steps": 18}
    outcome = {"host": "there", "code": 0, "report": report, "errors": ""}
    later = iter([None, {"curves": {}}])
    with monkeypatch.context() as patch:
        patch.setattr(lab, "find_record", lambda *arguments: next(later))
        assert lab._returned(run, tmp_path, outcome)["curves"] == {}
    with pytest.raises(RuntimeError, match="EW seed 0 ended on there, but its record is not in"):
        lab._returned(run, tmp_path, outcome, patience=0.0)


def test_jobs_need_a_benchmark_that_has_a_name(tmp_path):
    with pytest.raises(ValueError, match="is in no table"):
        run_all(replace(toy, name="mine"), ["EW", "STL"], out=tmp_path, jobs=2)


@pytest.mark.full
def test_one_pending_run_gets_a_process_too(tmp_path):
    assert statuses(run_all("toy", ["EW"], out=tmp_path, jobs=2)) == ["done now"]
    assert read_records(tmp_path)[0]["threads"] == 1
    with pytest.raises(ValueError, match="is in no table"):
        run_all(replace(toy, name="mine"), ["EW"], out=tmp_path, jobs=2)


def test_no_processes_are_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="jobs must be a whole number from 1, got 0"):
        run_all("toy", ["EW"], out=tmp_path, jobs=0)
    with pytest.raises(SystemExit, match="2"):
        main(["--benchmark", "toy", "--methods", "EW", "--jobs", "0", "--out", str(tmp_path)])
    assert "jobs must be a whole number from 1" in capsys.readouterr().err and not list(
        tmp_path.iterdir()
    )


def test_a_run_that_another_process_finished_meanwhile_is_not_done_again(tmp_path):
    def load(*arguments):
        run_all(
            "toy", ["STL"], out=tmp_path
        )  # another process, while the first run of this one is prepared
        return toy.load(*arguments)

    slow = replace(toy, load=load)
    records = run_all(slow, ["EW", "STL"], out=tmp_path)
    assert statuses(records) == ["done now", "already there"] and records[1]["steps_now"] == 0
    assert statuses(run_all(slow, ["STL"], out=tmp_path, fresh=True)) == ["done now"]


@pytest.mark.parametrize("left", ["", ".previous", ".new"])
def test_what_is_left_of_a_checkpoint_makes_a_run_pending(tmp_path, left):
    record = run_all("toy", ["EW"], out=tmp_path)[0]
    (tmp_path / "checkpoints" / f"{record['identity']}.pt{left}").write_bytes(b"")
    assert plan("toy", ["EW"], [0], "smoke", tmp_path)[0].record is None


def test_a_composition_that_cannot_be_says_why(tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--benchmark", "toy", "--methods", "DB-MTL+log", "--out", str(tmp_path)])
    assert "DB-MTL has a loss transform already" in capsys.readouterr().err
    with pytest.raises(ValueError, match="did you mean 'DB-MTL'"):
        check_names("toy", ["DBMTL+log"], "smoke")


@pytest.mark.full
@pytest.mark.parametrize("jobs", ["1", "2"])
def test_missing_data_are_told_without_a_traceback(tmp_path, jobs):
    program = command(
        "--benchmark", "qm9", "--methods", "EW", "--scale", "gpu", "--device", "cpu", "--jobs", jobs
    )
    program += ["--out", str(tmp_path)]
    without_data = os.environ | {"DBMTL_DATA": str(tmp_path)}
    done = subprocess.run(program, env=without_data, capture_output=True, text=True)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert (
        done.stderr.startswith("python -m dbmtl.run: error: ")
        and f"QM9 is not in {tmp_path}" in done.stderr
    )


def test_a_run_that_another_process_works_on_is_left_alone(tmp_path):
    found = []

    def meanwhile():
        if not found:
            found.extend(run_all("toy", ["EW"], out=tmp_path))
        return False

    train("toy", "EW", out=tmp_path, stop=meanwhile)
    assert statuses(found) == ["pending"] and "another process" in found[0]["reason"]


def start(tmp_path, *more):
    """A command that trains for minutes, once it has taken steps."""
    program = command(
        "--benchmark", "toy", "--methods", "DB-MTL,STL", "--scale", "cpu", "--out", tmp_path, *more
    )
    process = subprocess.Popen(program, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wanted, end = 2 if "--jobs" in more else 1, time.monotonic() + 60
    while (
        len(list(tmp_path.glob("checkpoints/*.pt"))) < wanted
        and process.poll() is None
        and time.monotonic() < end
    ):
        time.sleep(0.05)
    return process


@pytest.mark.full
def test_ctrl_c_with_jobs_stops_every_process_at_a_checkpoint(tmp_path):
    process = start(tmp_path, "--checkpoint-seconds", "0.2", "--jobs", "2")
    process.send_signal(signal.SIGINT)
    shown, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors
    assert shown.count("stopped at step") == 2
    told = errors.splitlines()  # a line a run, and nothing else
    assert len(told) == 2 and all(": stopped at step " in line for line in told)
    assert not list(tmp_path.glob("*/*.json")) and len(list(tmp_path.glob("checkpoints/*.pt"))) == 2


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_ctrl_c_stops_at_a_checkpoint(tmp_path, capsys, number):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)

    def tell():
        while not list(tmp_path.glob("checkpoints/*.pt")):
            time.sleep(0.02)
        os.kill(os.getpid(), number)

    thread = threading.Thread(target=tell, daemon=True)
    thread.start()
    options = ["--checkpoint-seconds", "0.1", "--scale", "cpu", "--out", str(tmp_path)]
    assert main(["--benchmark", "toy", "--methods", "DB-MTL,STL", *options]) == 130
    thread.join()
    shown = capsys.readouterr().out
    assert "stopped at step" in shown and "pending" in shown and not list(tmp_path.glob("*/*.json"))
    assert handlers == (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM))


def test_a_child_without_its_parent_does_not_train(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(lab.torch, "set_num_threads", lambda n: None)
    options = ["--benchmark", "toy", "--methods", "EW", "--out", str(tmp_path), "--parent"]
    main([*options, str(os.getppid() + 1)])
    assert "pending" in capsys.readouterr().out
    main([*options, str(os.getppid())])
    assert "done now" in capsys.readouterr().out


@pytest.mark.slow
def test_children_stop_when_their_parent_is_gone(tmp_path):
    process = start(tmp_path, "--checkpoint-seconds", "0.2", "--jobs", "2")
    children = subprocess.run(
        ["ps", "-o", "pid=", "--ppid", str(process.pid)], capture_output=True, text=True
    ).stdout.split()
    process.kill()
    process.communicate()
    assert len(children) == 2
    end = time.monotonic() + 20
    while any(os.path.exists(f"/proc/{pid}") for pid in children) and time.monotonic() < end:
        time.sleep(0.1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in children)


def test_the_command_prints_a_table_and_writes_records(tmp_path, capsys):
    assert (
        main(["--benchmark", "toy", "--methods", "EW", "--seeds", "0,1", "--out", str(tmp_path)])
        == 0
    )
    assert capsys.readouterr().out.count("done now") == 2
    assert sorted(
        json.loads(path.read_text())["config"]["seed"] for path in tmp_path.glob("*/*.json")
    ) == [0, 1]


def test_a_failed_run_is_told_by_the_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Balancer, "backward", no_convergence)
    assert main(["--benchmark", "toy", "--methods", "EW", "--out", str(tmp_path)]) == 1
    assert "RuntimeError: no convergence" in capsys.readouterr().out


# ---------------------------------------------------------------------------------- what came out


def test_the_command_line_prints_the_metrics_and_the_data(tmp_path, capsys):
    line = ["--benchmark", "toy", "--methods", "STL,EW", "--seeds", "0,1", "--out", str(tmp_path)]
    assert main(line) == 0
    shown = capsys.readouterr()
    title, head, *rows, folder = shown.out.split("\n\n")[1].splitlines()
    assert title.startswith("test metrics at the best validation epoch, smoke scale; data: generat")
    assert head.split()[:3] == ["method", "seed", "delta_p"] and "unit MAE (down)" in head
    assert folder == str(tmp_path)
    by_run = {tuple(row.split()[:2]): row.split()[2:] for row in rows}
    records = {
        (r["config"]["method"], str(r["config"]["seed"])): r
        for r in run_all("toy", ["STL", "EW"], [0, 1], out=tmp_path)
    }
    assert by_run.keys() == records.keys()
    for (method, seed), (gain, *values) in by_run.items():
        record = records[method, seed]
        test = record["selected"]["best validation epoch"]["test"]
        baseline = records["STL", seed]["selected"]["best validation epoch"]["test"]
        assert gain == f"{delta_p(test, baseline, record['directions']):+.2f}"
        assert values == [f"{test[task]['MAE']:.4g}" for task in record["directions"]]
    # off a terminal, a line a run as it ends
    assert shown.err.splitlines() == [
        "STL seed 0: done now, 54 steps",
        "EW seed 0: done now, 18 steps",
        "STL seed 1: done now, 54 steps",
        "EW seed 1: done now, 18 steps",
    ]


def test_without_single_tasks_there_is_no_delta_p(tmp_path):
    [record] = run_all("toy", ["EW"], out=tmp_path)
    _, _, _, row = metrics_table([record]).splitlines()
    assert row.split()[:3] == ["EW", "0", "-"]


def test_single_tasks_with_settings_of_their_own_are_no_baseline(tmp_path):
    methods = ["STL(learning_rate=0.01)", "EW"]
    *_, row = metrics_table(run_all("toy", methods, out=tmp_path)).splitlines()
    assert row.split()[:3] == ["EW", "0", "-"]


def test_where_nothing_has_finished_there_are_no_metrics(tmp_path):
    [record] = run_all("toy", ["EW"], out=tmp_path, budget=0.0001)
    assert metrics_table([record]) == ""


@pytest.mark.full
def test_processes_tell_of_each_run_as_well(tmp_path):
    told = []
    run_all("toy", ["EW", "DB-MTL"], out=tmp_path, jobs=2, told=told.append)
    assert sorted(record["config"]["method"] for record in told) == ["DB-MTL", "EW"]
    assert {record["status"] for record in told} == {"done now"}

"""Many runs: what is pending, time, processes, interruptions and names."""

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
from dbmtl.experiments import run as lab
from dbmtl.experiments.records import read_records, write_record
from dbmtl.experiments.replay import replay_all
from dbmtl.experiments.run import check_names, main, plan, run_all, run_table
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


def test_no_time_leaves_everything_pending(tmp_path):
    records = run_all("toy", ["EW", "STL"], out=tmp_path, budget=0.0001)
    assert statuses(records) == ["pending", "pending"] and not list(tmp_path.glob("*.json"))
    assert "pending" in run_table(records)


def test_a_method_that_a_network_cannot_run_does_not_end_the_others(tmp_path):
    refused, done = run_all("nyuv2-segnet", ["MGDA-UB", "EW"], out=tmp_path)
    assert refused["state"] == refused["status"] == "failed" and done["state"] == "finished"
    assert "cannot run on nyuv2-segnet" in refused["reason"] and "one tensor" in refused["reason"]
    assert "cannot run on nyuv2-segnet" in run_table([refused, done])
    assert [path.name[:15] for path in tmp_path.glob("*.json")] == ["nyuv2-segnet-sm"]


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


def test_a_missing_cuda_device_is_said_so(monkeypatch):
    monkeypatch.setattr(lab.torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device; use cpu"):
        check_names("toy", ["EW"], "smoke", device="cuda")


# ---------------------------------------------------------------------------------------- processes


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
    assert shown.count("stopped at step") == 2 and errors == ""
    assert not list(tmp_path.glob("*.json")) and len(list(tmp_path.glob("checkpoints/*.pt"))) == 2


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
    assert "stopped at step" in shown and "pending" in shown and not list(tmp_path.glob("*.json"))
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
        json.loads(path.read_text())["config"]["seed"] for path in tmp_path.glob("*.json")
    ) == [0, 1]


def test_a_failed_run_is_told_by_the_exit_code(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Balancer, "backward", no_convergence)
    assert main(["--benchmark", "toy", "--methods", "EW", "--out", str(tmp_path)]) == 1
    assert "RuntimeError: no convergence" in capsys.readouterr().out

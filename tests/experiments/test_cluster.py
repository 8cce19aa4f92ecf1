"""Sweeps on a cluster: what is sent again, and real local clusters that lose a worker."""

import contextlib
import fcntl
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path

import pytest

from dbmtl.benchmarks.toy import toy
from dbmtl.experiments import cluster as module
from dbmtl.experiments import run as lab
from dbmtl.experiments.cluster import WorkerLost, run_on, run_remotely
from dbmtl.experiments.records import read_records
from dbmtl.experiments.run import main, run_all

pytestmark = pytest.mark.full

FINISHED = {
    "state": "finished",
    "reason": "",
    "step": 18,
    "steps": 18,
    "steps_now": 18,
    "status": "done now",
}
DONE = {"host": "here", "attempt": 1, "code": 0, "report": FINISHED, "errors": ""}
LOST = WorkerLost("killed")
LOCKED = {"state": "pending", "reason": "another process works on it", "status": "pending"}
TOY = ["--benchmark", "toy", "--methods", "EW", "--seeds", "0", "--scale"]


class Script:
    """A back end without workers: each run's outcomes in order; None ends when the sign is gone."""

    def __init__(self, outcomes, begun=True):
        self.outcomes = outcomes
        self.begun = begun
        self.sent = []
        self.cancelled = []
        self.most = 0
        self.open = {}

    def send(self, function, arguments, folder, name, variables):
        assert function is run_remotely
        self.sent.append(name)
        self.open[name] = self.outcomes[int(name.split("-")[0])].pop(0)
        self.folder = Path(folder)
        self.most = max(self.most, len(self.open))
        if self.begun:
            (self.folder / f"{name}-0.mark").touch()
        return name

    def wait(self, handles, seconds):
        time.sleep(0.01)
        stopped = not (self.folder / "sign").exists()
        return [name for name in handles if self.open[name] is not None or stopped]

    def result(self, handle):
        outcome = self.open.pop(handle)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome or DONE | {"report": FINISHED | {"state": "stopped", "step": 7}}

    def cancel(self, handle):
        self.cancelled.append(handle)


def swept(script, folder, **options):
    return dict(
        run_on(
            script, {number: ["run", str(number)] for number in script.outcomes}, folder, **options
        )
    )


# --------------------------------------------------------------------------------------- sent again


@pytest.mark.parametrize(
    "first",
    [
        LOST,
        DONE | {"code": -9, "report": None},
        DONE | {"report": FINISHED | {"state": "stopped", "step": 3}},
        DONE | {"attempt": 2, "report": LOCKED},
    ],
    ids=["lost worker", "killed process", "stopped unbidden", "its orphan holds the lock"],
)
def test_what_did_not_come_to_its_end_is_sent_again(tmp_path, first):
    script = Script({0: [first, first, DONE], 1: [DONE]})
    assert swept(script, tmp_path) == {0: DONE, 1: DONE}
    assert sorted(script.sent) == ["0-1", "0-2", "0-3", "1-1"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "end",
    [
        DONE | {"report": FINISHED | {"state": "failed", "reason": "no convergence"}},
        DONE | {"report": LOCKED},
        DONE | {"code": 2, "report": None, "errors": "no data"},
        DONE | {"code": 1, "report": None, "errors": "Traceback"},
    ],
    ids=["failed", "somebody else works on it", "no data", "error"],
)
def test_an_end_is_an_end(tmp_path, end):
    script = Script({0: [end]})
    assert swept(script, tmp_path) == {0: end} and script.sent == ["0-1"]


def test_a_run_that_loses_every_worker_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "min", lambda *_: 0, raising=False)
    script = Script({0: [LOST] * 20, 1: [None]})
    with pytest.raises(RuntimeError, match="run 0 lost its worker ten times.*killed"):
        swept(script, tmp_path)
    assert script.sent.count("1-1") == 1 and len(script.sent) == 11 and not list(tmp_path.iterdir())


def test_a_machine_that_does_not_share_the_folder_is_named(tmp_path):
    there = run_remotely(["never"], str(tmp_path / "elsewhere"), "0-1")
    with pytest.raises(
        RuntimeError, match=f"{re.escape(socket.gethostname())} does not see .* all machines share"
    ):
        swept(Script({0: [there]}), tmp_path)


def test_at_most_so_many_at_a_time(tmp_path):
    for jobs, most in ((2, 2), (None, 5)):
        script = Script({number: [DONE] for number in range(5)})
        assert len(swept(script, tmp_path, jobs=jobs)) == 5 and script.most == most


class OneByOne(Script):
    """The first that was sent ends alone, and each outcome is told."""

    def wait(self, handles, seconds):
        return super().wait(handles, seconds)[:1]


def test_whoever_ends_makes_room_for_one(tmp_path):
    script = OneByOne({number: [DONE] for number in range(5)})
    assert len(swept(script, tmp_path, jobs=2)) == 5 and script.most == 2


def test_every_end_is_told_once(tmp_path):
    script = Script({0: [LOST, DONE], 1: [DONE]})
    told = list(run_on(script, {0: ["run"], 1: ["run"]}, tmp_path))
    assert sorted(number for number, _ in told) == [0, 1]


def test_the_tenth_run_is_not_the_first(tmp_path):
    """Marks are told apart by the whole number of a run, and of a sending."""
    assert module._begin(tmp_path, "10-1") == (1, None)
    assert not module._begun(tmp_path, "1-1") and not module._begun(tmp_path, "10-2")
    assert module._begin(tmp_path, "1-10") == (1, None)
    assert not module._begun(tmp_path, "1-1") and module._begun(tmp_path, "1-10")


# ----------------------------------------------------------------------------------------- stopping


@pytest.mark.parametrize("why", ["stop", "time"])
def test_a_stop_takes_back_what_has_not_begun_and_waits_for_the_rest(tmp_path, why):
    script, asked = Script({number: [None] for number in range(3)}), []
    script.begun = False

    def now():
        asked.append(1)
        if len(asked) == 3:
            (script.folder / "1-1-0.mark").touch()
        return len(asked) > 5

    def seconds_left():
        return -1.0 if now() else 60.0

    options = {"stop": {"stop": now}, "time": {"left": seconds_left}}[why]
    ended = swept(script, tmp_path, **options)
    assert (
        script.cancelled == ["0-1", "2-1"]
        and list(ended) == [1]
        and ended[1]["report"]["step"] == 7
    )


def test_what_is_lost_after_the_stop_is_not_sent_again(tmp_path):
    script, asked = Script({0: [LOST, DONE]}), []
    script.wait = lambda handles, seconds: handles if len(asked) > 3 else []
    ended = swept(script, tmp_path, stop=lambda: asked.append(1) or len(asked) > 3)
    assert ended == {0: {"lost": "killed"}} and script.sent == ["0-1"]


def test_a_stop_before_a_run_is_sent_again_tells_what_it_did(tmp_path):
    first = DONE | {"report": FINISHED | {"state": "stopped", "step": 3}}
    script, asked = Script({0: [first, DONE]}), []
    ended = swept(script, tmp_path, stop=lambda: asked.append(1) or len(asked) == 3)
    assert ended == {0: first} and script.sent == ["0-1"]


def test_an_error_in_the_sweep_ends_the_sign(tmp_path):
    script = Script({0: [DONE], 1: [None]})
    with contextlib.closing(run_on(script, {0: [], 1: []}, tmp_path)) as ended:
        next(ended)
        assert (script.folder / "sign").exists()
    assert not list(tmp_path.iterdir())


def test_the_sign_changes_while_the_sweep_lives_and_tells_the_time_left(tmp_path):
    signs, script = [], Script({0: [None]})

    def look():
        signs.append(json.loads((script.folder / "sign").read_text()))
        return len(signs) > 4

    script.wait = lambda handles, seconds: handles if look() else []
    script.outcomes[0] = [DONE]
    swept(script, tmp_path, left=lambda: 50.0)
    assert [left for _, left in signs] == [50.0] * 5 and len({count for count, _ in signs}) == 5


# ------------------------------------------------------------------------------------ on the worker


def give(folder, left=None):
    module._give_sign(Path(folder), 0, left)


def test_a_run_whose_sweep_is_gone_stops_at_a_checkpoint(tmp_path):
    folder, out = tmp_path / "sweep", tmp_path / "out"
    folder.mkdir()
    give(folder)

    def gone():
        while not list(out.glob("checkpoints/*.pt")):
            time.sleep(0.02)
        (folder / "sign").unlink()

    thread = threading.Thread(target=gone)
    thread.start()
    told = run_remotely(
        [*TOY, "cpu", "--out", str(out), "--checkpoint-seconds", "0.1"], str(folder), "0-1"
    )
    thread.join()
    assert (
        told["code"] == 130 and told["report"]["state"] == "stopped" and told["report"]["step"] > 0
    )
    assert list(out.glob("checkpoints/*.pt")) and not list(out.glob("*/*.json"))


@pytest.fixture
def program(tmp_path, monkeypatch):
    """A stand-in for Python, which writes down its command line; lines of shell can be added."""
    path = tmp_path / "python"
    path.write_text(
        f'#!/bin/sh\necho "$@" >> {tmp_path}/told\n'
        f"echo $DBMTL_DATA $OMP_NUM_THREADS >> {tmp_path}/told\n"
    )
    path.chmod(0o755)
    monkeypatch.setattr(module.sys, "executable", str(path))
    return path


def test_a_run_stops_when_the_sign_does_not_change(tmp_path, program, monkeypatch):
    with open(program, "a") as file:
        file.write("exec sleep 60\n")
    give(tmp_path)
    monkeypatch.setattr(module, "SILENCE", 0.5)
    began = time.monotonic()
    told = run_remotely([], str(tmp_path), "0-1")
    assert (
        told["code"] == -signal.SIGTERM
        and told["report"] is None
        and 0.5 < time.monotonic() - began < 30
    )


def test_a_run_goes_on_while_the_sign_changes(tmp_path, program, monkeypatch):
    with open(program, "a") as file:
        file.write("sleep 4\nexit 3\n")
    give(tmp_path)
    monkeypatch.setattr(module, "SILENCE", 3.0)
    ended = threading.Event()

    def live():
        for count in range(1, 10_000):
            module._give_sign(tmp_path, count, None)
            if ended.wait(0.2):
                break

    thread = threading.Thread(target=live)
    thread.start()
    assert run_remotely([], str(tmp_path), "0-1")["code"] == 3
    ended.set()
    thread.join()


def test_the_worker_passes_on_time_parent_and_first_mark(tmp_path, program):
    give(tmp_path, 12.5)
    run_remotely(["--seeds", "7"], str(tmp_path), "0-1", {"DBMTL_DATA": "/data"})
    time.sleep(0.05)
    again = run_remotely(["--seeds", "7"], str(tmp_path), "0-2")
    first, given, second, _ = (tmp_path / "told").read_text().splitlines()
    assert (
        first.startswith("-m dbmtl.run --seeds 7 --report ") and f"--parent {os.getpid()}" in first
    )
    assert first.endswith("--budget 12.500s") and given == "/data 1" and again["attempt"] == 2
    mark = next(tmp_path.glob("0-1-*.mark"))
    assert float(second.split("--since ")[1]) == mark.stat().st_mtime
    assert mark.read_text().split() == [socket.gethostname(), str(os.getpid())]
    (tmp_path / "sign").unlink()
    late = run_remotely(["--seeds", "7"], str(tmp_path), "0-3")
    assert late["code"] is None and len((tmp_path / "told").read_text().splitlines()) == 4


def test_a_repeated_fresh_run_goes_on_where_its_first_attempt_was(tmp_path):
    old = run_all("toy", ["EW"], out=tmp_path)[0]
    path = next(tmp_path.glob("*/*.json"))
    os.utime(path, (1000, 1000))
    assert (
        run_all("toy", ["EW"], out=tmp_path, fresh=True, since=2000)[0]["steps_now"] == 18
    )  # nothing new: anew
    assert (
        run_all("toy", ["EW"], out=tmp_path, fresh=True, since=2000)[0]["status"] == "already there"
    )
    os.utime(path, (1000, 1000))
    calls = iter(range(100))
    part = run_all(
        "toy", ["EW"], out=tmp_path, fresh=True, since=2000, stop=lambda: next(calls) == 5
    )
    assert part[0]["status"] == "stopped at step 4 of 18"
    rest = run_all("toy", ["EW"], out=tmp_path, fresh=True, since=2000)[0]
    assert rest["steps_now"] == 14 and rest["curves"] == old["curves"]


def test_the_worker_needs_no_framework_and_the_command_no_cluster():
    code = (
        "import sys, dbmtl.experiments.cluster\n"
        "print({'torch', 'numpy'} & set(sys.modules))\n"
        "import dbmtl.experiments.run\n"
        "print({'ray', 'dask', 'distributed'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["set()", "set()"], done.stderr


# ------------------------------------------------------------------------------------------ run_all


class Threads:
    """Two workers that are threads; the runs in `lost` are lost once, after they have ended."""

    def __init__(self, lost=()):
        self.pool = ThreadPoolExecutor(2)
        self.lost = set(lost)
        self.names = {}

    def send(self, function, *arguments):
        handle = self.pool.submit(function, *arguments)
        self.names[handle] = arguments[2]
        return handle

    def wait(self, handles, seconds):
        return list(wait(handles, seconds, "FIRST_COMPLETED").done)

    def result(self, handle):
        number = int(self.names[handle].split("-")[0])
        outcome = handle.result()
        if number in self.lost:
            self.lost.remove(number)
            raise WorkerLost("gone")
        return outcome

    def cancel(self, handle):
        handle.cancel()


def test_a_run_that_ended_before_its_worker_was_lost_is_not_done_twice(tmp_path):
    one = run_all("toy", ["EW", "STL"], out=tmp_path / "one")
    threads = Threads(lost=[0])
    both = run_all(
        "toy",
        ["EW", "STL"],
        out=tmp_path / "two",
        cluster=threads,
        jobs=2,
        fresh=True,
        monitor_every=9,
    )
    assert [r["status"] for r in both] == ["already there", "done now"] and len(threads.names) == 3
    assert [r["curves"] for r in both] == [r["curves"] for r in one] and both[0]["monitors"][
        "steps"
    ] == [0, 9]
    assert [r["seconds"]["sessions"] for r in both] == [1, 1] and both[0]["threads"] == 1
    again = run_all(
        "toy", ["EW", "STL"], out=tmp_path / "two", cluster="ray"
    )  # all is there: no cluster is needed
    assert [r["status"] for r in again] == ["already there"] * 2


def test_a_repeated_run_waits_until_its_orphan_lets_go(tmp_path, monkeypatch):
    record = run_all("toy", ["EW"], out=tmp_path)[0]
    next(tmp_path.glob("*/*.json")).unlink()
    lock = open(tmp_path / "checkpoints" / f"{record['identity']}.lock", "w")
    fcntl.flock(lock, fcntl.LOCK_EX)
    begin, outcomes, outcome = module._begin, [], module._outcome
    monkeypatch.setattr(module, "_begin", lambda folder, name: (begin(folder, name)[0] + 1, 0.0))

    def seen(cluster, handle):
        outcomes.append(outcome(cluster, handle))
        lock.close()
        return outcomes[-1]

    monkeypatch.setattr(module, "_outcome", seen)
    done = run_all("toy", ["EW"], out=tmp_path, cluster=Threads())[0]
    assert [o["report"]["status"] for o in outcomes] == ["pending", "done now"] and done[
        "curves"
    ] == record["curves"]


def test_errors_of_a_run_are_those_of_jobs(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path))
    with pytest.raises(ValueError, match="is in no table"):
        run_all(replace(toy, name="mine"), ["EW"], out=tmp_path, cluster=Threads())
    missing = DONE | {"code": 2, "report": None, "errors": "QM9 is not in"}
    with pytest.raises(FileNotFoundError, match="EW seed 0 ended with 2:\nQM9 is not in"):
        run_all("toy", ["EW"], out=tmp_path, cluster=Script({0: [missing]}))
    broken = missing | {"code": 1, "errors": "Traceback\nKeyError: 'z'"}
    (lost,) = run_all("toy", ["EW"], out=tmp_path, cluster=Script({0: [broken]}))
    assert lost["state"] == lost["status"] == "lost"
    assert lost["reason"] == "ended with exit code 1: KeyError: 'z'"
    monkeypatch.setattr(lab._returned, "__defaults__", (0.3,))
    with pytest.raises(
        RuntimeError, match="ended on here, but its record is not in .* all machines share"
    ):
        run_all("toy", ["EW"], out=tmp_path, cluster=Script({0: [DONE]}))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--cluster", "rya"], "unknown cluster 'rya': did you mean 'ray'"),
        (["--cluster", "dusk"], "did you mean 'dask'"),
        (["--cluster", "ray"], "pip install dbmtl[ray]"),
        (["--cluster", "dask"], "pip install dbmtl[dask]"),
        (["--cluster", "ray", "--methods", "DBMTL"], "did you mean 'DB-MTL'"),
    ],
)
def test_unknown_clusters_and_missing_packages_are_told_before_training(
    tmp_path, capsys, monkeypatch, words, message
):
    for name in ("ray", "dask", "distributed"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(SystemExit, match="2"):
        main(["--benchmark", "toy", "--methods", "EW", "--out", str(tmp_path / "new"), *words])
    assert message in capsys.readouterr().err and not (tmp_path / "new").exists()


# ------------------------------------------------------------------------------------ real clusters

# Every Python of the cluster reads this: runs become slow, and write down what they do.
SITE = """
import os, sys
if "dbmtl.run" in sys.orig_argv and "--parent" in sys.orig_argv:
    import time
    from dbmtl.experiments import train
    log = os.open({log!r}, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    def note(kind, run):
        line = f"{{os.getpid()}} {{kind}} {{run.identity}} {{run.step}}\\n"
        os.write(log, line.encode())
    advance, state_dict, make_record = train.Run.advance, train.Run.state_dict, train.make_record
    def slow(run):
        time.sleep(0.25)
        advance(run)
        note("step", run)
    def stored(run):
        note("store", run)
        return state_dict(run)
    def recorded(run, *more):
        note("record", run)
        return make_record(run, *more)
    train.Run.advance, train.Run.state_dict, train.make_record = slow, stored, recorded
"""


def need(*packages):
    """Skip without the packages; but fail where ci/setup.sh installed `dev`, or on CI."""
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    stamp = Path(sys.prefix) / ".dbmtl-setup"
    is_set_up = stamp.exists() and " dev\n" in stamp.read_text()
    if missing and (os.environ.get("CI") or is_set_up):
        pytest.fail(f"{', '.join(missing)} belong to the extra dev, and are missing")
    if missing:
        pytest.skip(f"needs {', '.join(missing)}")


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def until(condition, seconds=300):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited for nothing"
        time.sleep(0.05)
    return found


@contextlib.contextmanager
def processes(environment):
    """A function that starts a process whose output goes to a file; all end with the context."""
    started = []

    def start(output, *words):
        with open(output, "wb") as file:
            options = {
                "stdout": file,
                "stderr": file,
                "env": environment,
                "start_new_session": True,
            }
            started.append(subprocess.Popen([sys.executable, *map(str, words)], **options))
        return started[-1]

    try:
        yield start
    finally:
        for process in started[::-1]:
            process.terminate()
        for process in started:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()


@contextlib.contextmanager
def ray_cluster(folder, environment):
    """`ray start --head` with two workers: the variables by which it is found."""
    need("ray")
    words = (
        "start --head --block --node-ip-address 127.0.0.1 --num-cpus 2 --include-dashboard false"
    )
    words += " --object-store-memory 80000000 --disable-usage-stats"
    with contextlib.ExitStack() as stack:
        start = stack.enter_context(
            processes(environment | {"RAY_agent_register_timeout_ms": "100000"})
        )
        for _ in range(3):  # Ray gives itself 30 seconds, which a busy machine may not
            folder_of_ray = tempfile.mkdtemp(prefix="ray")  # a socket's path may not be long
            stack.callback(shutil.rmtree, folder_of_ray, ignore_errors=True)
            port = free_port()
            line = [*words.split(), "--port", port, "--temp-dir", folder_of_ray]
            for agent in (
                "dashboard-agent-grpc",
                "dashboard-agent-listen",
                "metrics-export",
                "runtime-env-agent",
            ):
                line += [
                    f"--{agent}-port",
                    free_port(),
                ]  # otherwise Ray waits for them, and not for long
            process = start(folder / "ray", "-m", "ray.scripts.scripts", *line)
            started = until(
                lambda p=process: p.poll() or "runtime started" in (folder / "ray").read_text()
            )
            if started is True:
                break
        else:
            pytest.fail((folder / "ray").read_text())
        yield {"RAY_ADDRESS": f"127.0.0.1:{port}"}


@contextlib.contextmanager
def dask_cluster(folder, environment):
    """A Dask scheduler and two workers that nobody starts again."""
    need("dask", "distributed")
    address = f"tcp://127.0.0.1:{free_port()}"
    with processes(environment) as start:
        start(
            folder / "dask",
            "-m",
            "distributed.cli.dask_scheduler",
            "--host",
            address,
            "--no-dashboard",
        )
        options = ["--nthreads", "1", "--no-nanny", "--no-dashboard", "--local-directory", folder]
        for worker in range(2):
            start(
                folder / f"worker{worker}", "-m", "distributed.cli.dask_worker", address, *options
            )
        until(lambda: (folder / "dask").read_text().count("Register worker") == 2)
        yield {"DASK_SCHEDULER_ADDRESS": address}


def sweep(name, out, environment):
    """The command, at work on three runs."""
    words = "--benchmark toy --methods EW --seeds 0,1,2 --checkpoint-seconds 0.5"
    words += f" --cluster {name} --out"
    line = [sys.executable, "-m", "dbmtl.run", *words.split(), str(out)]
    return subprocess.Popen(
        line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def events(log):
    """[(process, what, run, step)] of all attempts."""
    lines = [line.split() for line in log.read_text().splitlines()] if log.exists() else []
    return [(int(pid), kind, identity, int(step)) for pid, kind, identity, step in lines]


@pytest.mark.cluster
@pytest.mark.parametrize("name", ["ray", "dask"])
def test_a_real_cluster_is_stopped_continued_and_loses_a_worker(name, tmp_path):
    log, out, site = tmp_path / "log", tmp_path / "out", tmp_path / "site"
    site.mkdir()
    (site / "sitecustomize.py").write_text(SITE.format(log=str(log)))
    plain = os.environ | {"OMP_NUM_THREADS": "1"}
    plain.pop("RAY_ADDRESS", None), plain.pop("DASK_SCHEDULER_ADDRESS", None)
    make = {"ray": ray_cluster, "dask": dask_cluster}[name]
    paths = os.pathsep.join([str(site), *filter(None, [os.environ.get("PYTHONPATH")])])
    with make(tmp_path, plain | {"PYTHONPATH": paths}) as found:
        process = sweep(name, out, plain | found)
        until(
            lambda: (
                len({e[2] for e in events(log) if e[1] == "store"}) == 2
                or process.poll() is not None
            )
        )
        process.send_signal(signal.SIGINT)
        shown, errors = process.communicate(timeout=300)
        assert process.returncode == 130, errors
        assert (
            shown.count("stopped at step") == 2
            and shown.count("pending") == 1
            and not list(out.glob("*/*.json"))
        )

        process = sweep(name, out, plain | found)
        before = len(events(log))
        stores = until(
            lambda: (
                [e for e in events(log)[before:] if e[1] == "store"] or process.poll() is not None
            )
        )
        orphan = stores[0][0]
        worker = int(Path(f"/proc/{orphan}/stat").read_text().rpartition(")")[2].split()[1])
        marks = [path.read_text().split()[1] for path in out.glob("checkpoints/cluster-*/*.mark")]
        assert str(worker) in marks and worker != process.pid
        os.kill(worker, signal.SIGKILL)
        shown, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
        assert shown.count("done now") == 3, shown

    records = read_records(out)
    expected = run_all("toy", ["EW"], [0, 1, 2], out=tmp_path / "one")
    assert not list(out.glob("checkpoints/cluster-*")) and not list(out.glob("checkpoints/*.pt*"))
    for record, alone in zip(
        sorted(records, key=lambda r: r["config"]["seed"]), expected, strict=True
    ):
        for key in (
            "identity",
            "config",
            "state",
            "step",
            "selected",
            "floors",
            "curves",
            "skipped",
        ):
            assert record[key] == alone[key]
        mine = [event for event in events(log) if event[2] == record["identity"]]
        attempts = list(dict.fromkeys(pid for pid, *_ in mine))
        assert [kind for _, kind, *_ in mine].count("record") == 1 and mine[-1][1] == "record"
        assert len(attempts) == record["seconds"]["sessions"]
        steps = [step for _, kind, _, step in mine if kind == "step"]
        last = [[e for e in mine if e[0] == pid][-1] for pid in attempts]
        behind = sum(
            e[3] - max(s[3] for s in mine if s[0] == e[0] and s[1] == "store") for e in last[:-1]
        )
        assert len(steps) == 18 + behind and set(steps) == set(range(1, 19))
    assert (
        any(orphan == pid for pid, *_ in events(log))
        and max(r["seconds"]["sessions"] for r in records) == 3
    )


@pytest.mark.cluster
@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("ray", {"RAY_ADDRESS": "127.0.0.1:1"}),
        ("dask", {"DASK_SCHEDULER_ADDRESS": "tcp://127.0.0.1:1"}),
        ("dask", {}),
    ],
    ids=["ray", "dask", "dask without an address"],
)
def test_where_there_is_no_cluster_nothing_is_trained(name, found, tmp_path):
    need(name, *(["distributed"] if name == "dask" else []))
    environment = os.environ | {"DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT": "1s"}
    environment.pop("DASK_SCHEDULER_ADDRESS", None)
    process = sweep(name, tmp_path / "out", environment | found)
    shown, errors = process.communicate(timeout=120)
    assert process.returncode == 2 and shown == "" and "Traceback" not in errors
    assert f"python -m dbmtl.run: error: no {name.capitalize()} cluster found" in errors
    assert not (tmp_path / "out").exists()

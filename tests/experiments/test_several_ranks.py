"""One run in several processes: the numbers of one process, one record, one end."""

import json
import os
import signal
import socket
import subprocess
import time

import pytest

from dbmtl.experiments.records import read_records
from dbmtl.experiments.run import main, run_all

LIMIT = 120  # seconds; a launch takes a few
METHODS = ["DB-MTL", "FAMO", "MGDA-UB", "PCGrad", "STL"]

# what is trained in one process and in several: networks without dropout, and a data set whose
# second batch has a single sample, so that all ranks but one have none of it; where labels are
# missing, each of the three batches of a step of SDMGrad has counts of its own
PROGRAM = f"""
import json, sys
from dataclasses import replace
from torch import nn
from dbmtl.benchmarks.toy import toy, toy_multi
from dbmtl.experiments.run import process_group, run_all
from dbmtl.experiments.train import Run

def without_dropout(*arguments):
    network = toy.network(*arguments)
    for module in network.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return network

def masked(prediction, target):
    valid = target > 0
    return ((prediction - target).square() * valid).sum() / valid.sum().clamp(min=1)

def without_some_labels(benchmark):
    count = lambda target: (target > 0).sum()
    tasks = [replace(task, loss=masked, count=count) for task in benchmark.tasks]
    return replace(benchmark, tasks=tuple(tasks))

def numbers(benchmark, method, batch_size=16):
    sizes = dict(smoke=replace(benchmark.scale("smoke"), epochs=1, batch_size=batch_size))
    benchmark = replace(benchmark, network=without_dropout, scales=sizes)
    data = benchmark.load(benchmark.scale("smoke"), "cpu", 0)
    run = Run(benchmark, method, 0, "smoke", "cpu", None, data, monitor_every=3)
    while run.step < run.steps:
        run.advance()
    return dict(rows=run.rows, monitors=run.loop.monitors)

with process_group() as ranks:
    found = {{method: numbers(toy, method) for method in {METHODS}}}
    found["a rest of one sample"] = numbers(toy, "DB-MTL", 89)
    found["an input a task"] = numbers(toy_multi, "CAGrad+log")
    found["labels missing"] = numbers(without_some_labels(toy), "SDMGrad")

    # told to stop, on the last rank alone; then resumed, with dropout
    calls = iter(range(100))
    stop = lambda: next(calls) == 8 and ranks.rank == ranks.size - 1
    stopped = run_all("toy", ["DB-MTL"], out=sys.argv[2], stop=stop)
    resumed = run_all("toy", ["DB-MTL"], out=sys.argv[2])
    whole = run_all("toy", ["DB-MTL"], out=sys.argv[2], fresh=True)
    left = run_all("toy", ["DB-MTL"], [1], out=sys.argv[2], budget=0.001)
    if ranks.rank == 0:
        runs = dict(stopped=stopped, resumed=resumed, whole=whole, left=left)
        runs = {{name: found[0] for name, found in runs.items()}}
        json.dump(dict(found=found, runs=runs), open(sys.argv[1], "w"))
"""


def place(ranks):
    """Where the processes of a group meet."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    return {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks)}


def run_ranks(ranks, command):
    """The same command in several processes, as torchrun starts them; all must end well."""
    meeting = place(ranks)
    processes = []
    for rank in range(ranks):
        environment = os.environ | meeting | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        processes.append(subprocess.Popen(command, env=environment, **options))
    for process in processes:
        said, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0, said[-3000:]


def numbers_in(nested, place=""):
    """(place, number) of everything in nested dictionaries and lists."""
    if isinstance(nested, dict):
        for key, value in nested.items():
            yield from numbers_in(value, f"{place} {key}")
    elif isinstance(nested, list):
        for position, value in enumerate(nested):
            yield from numbers_in(value, f"{place} {position}")
    else:
        yield place, nested


@pytest.fixture(scope="module")
def trained(tmp_path_factory, warm_python):
    """A function that runs the program in so many processes, once: what it found, and its folder
    of records."""
    folder = tmp_path_factory.mktemp("ranks")
    program = folder / "program.py"
    program.write_text(PROGRAM)

    def found(ranks):
        file = folder / f"{ranks}.json"
        records = folder / str(ranks)
        if not file.exists():
            run_ranks(ranks, [*warm_python, str(program), str(file), str(records)])
        return json.loads(file.read_text()) | {"records": records}

    return found


@pytest.mark.full
@pytest.mark.parametrize("ranks", [2, 3])
def test_several_ranks_give_the_numbers_of_one_process(trained, ranks):
    """Losses and metrics to 1e-6; monitored numbers to the four digits that are kept of them."""
    one = dict(numbers_in(trained(1)["found"]))
    several = dict(numbers_in(trained(ranks)["found"]))
    assert several.keys() == one.keys()
    for place, number in one.items():
        digits = {"rel": 1.01e-3, "abs": 1e-3} if "monitors" in place else {"rel": 1e-6}
        assert several[place] == pytest.approx(number, **digits), place


@pytest.mark.full
def test_a_run_on_two_ranks_is_stopped_resumed_and_recorded_once(trained):
    """With dropout: what each rank drew goes on where it stopped."""
    runs = trained(2)["runs"]
    assert runs["stopped"]["status"] == "stopped at step 7 of 18"
    assert runs["resumed"]["steps_now"] == 11 and runs["whole"]["steps_now"] == 18
    assert runs["resumed"]["curves"] == runs["whole"]["curves"]
    (record,) = read_records(trained(2)["records"])
    assert record["ranks"] == 2 and any("dropout" in note for note in record["notes"])
    assert record["identity"] == trained(1)["runs"]["whole"]["identity"]
    assert "ranks" not in trained(1)["runs"]["whole"]


@pytest.mark.full
def test_a_run_goes_on_with_as_many_ranks_as_began_it(trained):
    """A budget that is over before it began stops all ranks after a step."""
    assert trained(2)["runs"]["left"]["status"] == "stopped at step 1 of 18"
    found, alone = run_all("toy", ["DB-MTL"], [0, 1], out=trained(2)["records"])
    assert found["status"] == "already there"
    assert alone["status"] == "failed" and "by 2 ranks, not 1" in alone["reason"]


@pytest.mark.full
def test_torchrun_starts_and_a_signal_stops_all_ranks(tmp_path, warm_python):
    """One table and one line a run are shown, and at most one checkpoint is left."""
    meeting = place(2)
    torchrun = [*warm_python, "-m", "torch.distributed.run", "--no-python"]
    torchrun += ["--nproc-per-node", "2", "--master-addr", meeting["MASTER_ADDR"]]
    torchrun += ["--master-port", meeting["MASTER_PORT"], *warm_python]
    seeds = ",".join(map(str, range(500)))
    words = ["-m", "dbmtl.run", "--benchmark", "toy", "--methods", "EW", "--seeds", seeds]
    process = subprocess.Popen(
        [*torchrun, *words, "--out", str(tmp_path)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    )
    end = time.monotonic() + LIMIT
    while len(list(tmp_path.rglob("*.json"))) < 2 and time.monotonic() < end:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    shown, _ = process.communicate(timeout=LIMIT)
    assert process.returncode != 0
    assert shown.count("done now") >= 2 and shown.count("pending") > 100
    assert shown.count("stopped at step") == len(list(tmp_path.rglob("*.pt"))) <= 1
    assert all(record["ranks"] == 2 for record in read_records(tmp_path))


@pytest.mark.parametrize("option", [["--jobs", "2"], ["--cluster", "ray"]])
def test_ranks_and_several_runs_at_a_time_exclude_each_other(monkeypatch, capsys, option):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit) as end:
        main(["--benchmark", "toy", "--methods", "EW", *option])
    assert end.value.code == 2
    assert "go without torchrun" in capsys.readouterr().err

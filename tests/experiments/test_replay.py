"""Replays: exact, close or different, what cannot be run, and the file beside the records."""

import contextlib
import copy
import json
import multiprocessing
import os
import shutil
import signal
from collections import deque
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dbmtl.benchmarks.toy import toy
from dbmtl.core.balancer import Balancer
from dbmtl.experiments import replay as lab
from dbmtl.experiments.records import (
    encode_record,
    read_record,
    read_records,
    run_identity,
    runs_folder,
    write_record,
)
from dbmtl.experiments.replay import (
    compare_numbers,
    has_older_protocol,
    is_current,
    main,
    read_replays,
    replay,
    replay_all,
    replay_table,
    replays_path,
    run_of,
    write_replays,
)
from dbmtl.experiments.train import train
from dbmtl.models.efficientnet_lite0 import Lite0, load_lite0, pooled_features

RUNS = Path(__file__).resolve().parents[2] / "figures/runs"


@pytest.fixture(scope="module")
def trained_record(tmp_path_factory):
    out = tmp_path_factory.mktemp("made")
    return train("toy", "DB-MTL", seed=3, out=out, monitor_every=4)


@pytest.fixture
def record(trained_record):
    """A finished run of the toy with monitors."""
    return copy.deepcopy(trained_record)


# --------------------------------------------------------------------------------------- one record


@pytest.mark.parametrize("method", ["EW", "DB-MTL", "STL", "SDMGrad", "FAMO", "GradDrop"])
@pytest.mark.parametrize("name", ["toy", "toy-multi"])
def test_a_record_replays_exactly(name, method, tmp_path):
    record = train(name, method, seed=5, out=tmp_path, monitor_every=2)
    found = replay(record)
    networks = 3 if method == "STL" else 1
    assert (found["outcome"], found["worst"], found["epochs"]) == ("exact", 0, networks)
    assert found["steps"] == record["steps"] / 3  # the first of three epochs
    assert found["numbers"] >= 3 * 3 and found["torch"] == torch.__version__


def test_a_record_with_settings_of_its_own_replays_exactly(tmp_path):
    for hyper in ({"beta": 1 / 3}, {"beta": 0}, {"alpha": "mean"}):
        record = train("toy", "DB-MTL", out=tmp_path, hyper=hyper)
        assert replay(record)["outcome"] == "exact"


def test_the_sizes_are_those_of_the_record(tmp_path):
    smaller = replace(toy, scales={"smoke": replace(toy.scale("smoke"), width=8, epochs=1)})
    record = train(smaller, "EW", out=tmp_path)
    assert replay(record)["outcome"] == "exact"


def test_a_replay_leaves_threads_and_random_state_alone(record):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    threads = torch.get_num_threads()
    replay(record | {"threads": threads + 1})
    assert torch.equal(state, torch.get_rng_state()) and torch.get_num_threads() == threads


def test_a_replay_has_as_many_threads_as_its_record(record, monkeypatch):
    threads = []
    plain = lab.run_of

    def seen(*arguments):
        threads.append(torch.get_num_threads())
        return plain(*arguments)

    monkeypatch.setattr(lab, "run_of", seen)
    for count in (1, 2):
        replay(record | {"threads": count})
    assert threads == [1, 2]


def tampered(record, change):
    other = copy.deepcopy(record)
    change(other)
    return other


@pytest.mark.parametrize(
    ("change", "place"),
    [
        (lambda r: r["curves"]["train"]["unit"].__setitem__(0, 0.9), "epoch 1: train unit"),
        (
            lambda r: r["curves"]["validation"]["large"]["MAE"].__setitem__(0, None),
            "epoch 1: validation large MAE",
        ),
        (lambda r: r["curves"]["test"]["small"]["MAE"].__setitem__(0, 1.0), "test small MAE"),
        (lambda r: r["monitors"]["norms"]["unit"].__setitem__(1, 3.0), "step 4: norms unit"),
        (
            lambda r: r["monitors"]["cosines"]["unit|small"].__setitem__(0, -1.0),
            "step 0: cosines unit|small",
        ),
        (lambda r: r["monitors"]["weights"].pop("unit"), "step 0: weights unit"),
    ],
)
def test_a_tampered_number_is_named(record, change, place):
    other = tampered(record, change)
    found = replay(other)
    assert found["outcome"] == "differs" and found["first"]["place"].endswith(place)
    assert found["first"]["recorded"] != found["first"]["replayed"]


def test_what_came_after_the_first_epoch_is_not_compared(record):
    def change(other):
        other["curves"]["test"]["small"]["MAE"][1] = 1.0
        other["monitors"]["norms"]["unit"][2] = 3.0  # step 8 of epochs of 6

    assert replay(tampered(record, change))["outcome"] == "exact"


def faster(parameters, scale):
    return torch.optim.Adam(parameters, lr=1.01 * scale.learning_rate)


def test_another_learning_rate_differs(record):
    found = replay(record, replace(toy, optimizer=faster))
    assert found["outcome"] == "differs" and 1e-5 < found["worst"] < 1
    assert "monitors" in record and found["first"]["place"].startswith("step 4: ")


def test_a_thinned_record_is_compared_where_it_has_numbers(record):
    def change(other):
        for columns in (other["curves"], other["monitors"]):
            for _, column in lab._columns_of(columns):
                del column[1:2]

    found = replay(tampered(record, change))
    assert found["outcome"] == "exact" and found["numbers"] < replay(record)["numbers"]


def test_the_last_digit_may_be_off_and_no_more():
    recorded = {"step 0: norms a": 9.999, "epoch 1: train a": 1.00000}
    for replayed, outcome in (
        ({"step 0: norms a": 9.999, "epoch 1: train a": 1.0}, "exact"),
        ({"step 0: norms a": 9.999, "epoch 1: train a": 1.00001}, "close"),
        ({"step 0: norms a": 10.00, "epoch 1: train a": 1.0}, "close"),
        ({"step 0: norms a": 9.999, "epoch 1: train a": 1.00003}, "differs"),
        ({"step 0: norms a": 9.98, "epoch 1: train a": 1.0}, "differs"),
        ({"step 0: norms a": 9.999}, "differs"),
        (recorded | {"epoch 1: train b": 1.0}, "differs"),
        ({"step 0: norms a": None, "epoch 1: train a": 1.0}, "differs"),
    ):
        assert compare_numbers(recorded, replayed)["outcome"] == outcome, replayed
    json.dumps(compare_numbers({"a": None}, {"a": 1.0}), allow_nan=False)


# ---------------------------------------------------------------------------- runs that ended early


def broken(step, task=1):
    """The toy, whose loss of one task is not finite at a step."""
    calls = []

    def loss(prediction, target):
        if prediction.requires_grad:
            calls.append(None)
        value = float("nan") if len(calls) == step + 1 else 1.0
        return value * (prediction - target).square().mean()

    tasks = list(toy.tasks)
    tasks[task] = replace(tasks[task], loss=loss)
    return replace(toy, tasks=tuple(tasks))


@pytest.mark.parametrize("step", [0, 4])
def test_a_run_that_ended_in_its_first_epoch_ends_there_again(step, tmp_path):
    record = train(broken(step), "EW", out=tmp_path)
    assert (record["state"], record["step"]) == ("diverged", step)
    found = replay(record, broken(step))
    assert (found["outcome"], found["steps"], found["epochs"]) == ("exact", step, 0)
    for other in (toy, broken(step + 1)):
        first = replay(record, other)["first"]
        assert first["recorded"] == f"diverged at step {step}" != first["replayed"]


def test_a_run_that_ended_later_is_replayed_as_far_as_its_first_epoch(tmp_path):
    record = train(broken(9), "EW", out=tmp_path)
    assert record["state"] == "diverged" and replay(record)["outcome"] == "exact"


def test_a_finished_record_whose_replay_ends_early_differs(record):
    first = replay(record, broken(2))["first"]
    assert (first["recorded"], first["replayed"]) == ("goes on", "diverged at step 2")


@pytest.mark.parametrize(
    ("step", "networks", "ends"),
    [(3, 1, "diverged at step 21"), (11, 2, "goes on"), (17, 2, "goes on")],
)
def test_networks_of_stl_after_the_one_that_ended_are_not_replayed(step, networks, ends, tmp_path):
    record = train(broken(step), "STL", out=tmp_path)
    assert (record["state"], record["step"]) == ("diverged", 18 + step)
    found = replay(record, broken(step))
    assert (found["outcome"], found["epochs"]) == ("exact", networks)
    if ends != "goes on":
        assert replay(record)["first"]["recorded"] == ends


# ------------------------------------------------------------------------------- what cannot be run


def missing(*_):
    raise FileNotFoundError("no data in /somewhere/on/this/machine")


@pytest.mark.parametrize(
    ("change", "benchmark", "reason"),
    [
        ({}, replace(toy, load=missing), "its data are not here"),
        ({"data": {"hash": "0" * 64}}, None, "the data here are others"),
        ({"device": "cuda: NVIDIA H200"}, None, "it was made on a GPU"),
        ({"benchmark": "toyota"}, None, "no such benchmark or scale"),
        ({"scale": {"name": "smoke", "epochs": 1, "wings": 2}}, None, "no such benchmark or scale"),
        ({"method": "Nash-XTL"}, None, "no such method"),
        ({"hyper": {"betta": 1}}, None, "no such method"),
        ({"protocol": 2}, None, "another configuration"),
    ],
)
def test_what_cannot_be_run_says_why(record, change, benchmark, reason):
    config = {name: value for name, value in change.items() if name in record["config"]}
    other = record | {name: value for name, value in change.items() if name not in config}
    other["config"] = record["config"] | config
    found = replay(other, benchmark)
    assert found["outcome"] == "not run" and reason in found["reason"]
    assert set(found) == {"record", "outcome", "reason"} and "/" not in found["reason"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("office31", "STL by epochs"),
        ("pacs", "STL by epochs"),
        ("cityscapes", "epochs selected on test"),
        ("nyuv2", "epochs selected on test"),
        ("toy", ""),
    ],
)
def test_a_record_of_an_older_protocol_is_neither_equal_nor_different(
    record, name, reason, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(lab, "_load", lambda *_: pytest.fail("nothing is loaded"))
    older = json.loads(json.dumps(record))
    older["config"] |= {"benchmark": name, "protocol": 0 if name == "toy" else 1}
    assert replay(older) == {
        "record": replay(older)["record"],
        "outcome": "older protocol",
        "reason": reason,
    }
    older["identity"] = run_identity(older["config"], older["data"]["hash"])
    runs = tmp_path / "figures/runs"
    write_record(older, runs)
    assert main(["--runs", str(runs)]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[-5:] == ["0", "0", "0", "0", "1"]
    (stored,) = read_replays(runs).values()
    assert stored["outcome"] == "older protocol"
    assert is_current(read_records(runs)[0], runs) is None


def test_other_features_of_the_same_pictures_are_compared(record):
    data = replace(toy.load(toy.scale("smoke")), hash="features of another machine")
    assert replay(record, data=data)["reason"] == "the data here are others"
    same = replace(data, source_hash="pictures")
    assert replay(record, data=same)["reason"] == "the data here are others"
    with_source = record | {"data": record["data"] | {"source_hash": "pictures"}}
    found = replay(with_source, data=same)
    assert (found["outcome"], found["features"]) == ("exact", "others")
    assert "features" not in replay(record)

    # a loss that is off by 5e-5, as the features of another processor may leave it
    with_source["curves"] = json.loads(json.dumps(record["curves"]))
    with_source["curves"]["train"]["large"][0] *= 1 + 5e-5
    assert replay(with_source, data=same)["outcome"] == "close"
    assert replay(with_source, data=replace(same, hash=record["data"]["hash"]))["first"]
    with_source["curves"]["train"]["large"][0] *= 1 + 5e-4
    assert replay(with_source, data=same)["outcome"] == "differs"


def test_an_error_that_is_not_the_methods_is_not_hidden(record):
    def loss(prediction, target):
        raise RuntimeError("a bug")

    with pytest.raises(RuntimeError, match="a bug"):
        replay(record, replace(toy, tasks=(replace(toy.tasks[0], loss=loss), *toy.tasks[1:])))


# ----------------------------------------------------------------------------------------- the file


@pytest.fixture(scope="module")
def trained_runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    for name in ("toy", "toy-multi"):
        for method in ("EW", "STL"):
            train(name, method, out=folder, monitor_every=4)
    return folder


@pytest.fixture
def runs(trained_runs, tmp_path):
    """A folder with four records of two benchmarks."""
    return shutil.copytree(trained_runs, tmp_path / "figures/runs")


def records_of(folder):
    return [read_record(path) for path in sorted(folder.glob("*/*.json"))]


def test_the_file_lies_beside_the_records_and_is_stable(runs):
    replay_all(records_of(runs), runs)
    path = replays_path(runs)
    content = path.read_bytes()
    assert path == runs.parent / "replay.json" and len(content.splitlines()) == 4 + 2
    stored = json.loads(content)
    assert list(stored) == sorted(stored) and content == encode_record(stored)
    replay_all(records_of(runs)[::-1], runs)
    assert path.read_bytes() == content
    assert len(records_of(runs)) == 4  # the file is none of them


def test_interrupted_and_continued_gives_the_same_file(runs, capsys):
    options = ["--runs", str(runs)]
    assert main(options) == 0
    content = replays_path(runs).read_bytes()
    replays_path(runs).unlink()
    calls = iter(range(100))
    replay_all(records_of(runs), runs, stop=lambda: next(calls) >= 4)
    assert 0 < len(read_replays(runs)) < 4
    assert main([*options, "--missing"]) == 0
    assert replays_path(runs).read_bytes() == content
    assert main([*options, "--missing"]) == 0
    assert capsys.readouterr().out.splitlines()[-2:] == [
        "records  exact  close  differs  not run  older protocol",
        str(replays_path(runs)),
    ]


def test_ctrl_c_keeps_what_was_found(runs, monkeypatch, capsys):
    plain = lab.replay

    def interrupted(*arguments, **options):
        os.kill(os.getpid(), signal.SIGINT)
        return plain(*arguments, **options)

    monkeypatch.setattr(lab, "replay", interrupted)
    assert main(["--runs", str(runs)]) == 130
    assert len(read_replays(runs)) == 1


@pytest.mark.full
def test_two_processes_find_the_same(runs):
    replay_all(records_of(runs), runs)
    content = replays_path(runs).read_bytes()
    replays_path(runs).unlink()
    replays = replay_all(records_of(runs), runs, jobs=2)
    assert len(replays) == 4 and replays_path(runs).read_bytes() == content
    with pytest.raises(ValueError, match="jobs must be a whole number from 1"):
        replay_all([], runs, jobs=0)


@pytest.mark.full
def test_a_killed_process_is_told_and_the_others_are_replayed(runs, monkeypatch, capsys):
    train("toy", "EW", seed=1, out=runs)  # the third group, for two processes
    killed = []

    @contextlib.contextmanager
    def kill_one_process():
        def stop():
            for child in multiprocessing.active_children()[: 1 - len(killed)]:
                killed.append(child)
                child.kill()
            return False

        yield stop

    monkeypatch.setattr(lab, "until_signal", kill_one_process)
    assert main(["--runs", str(runs), "--jobs", "2"]) == 1
    told = capsys.readouterr().out

    # Each record that was in hand is named once, and stored nowhere; the others are replayed.
    stored = read_replays(runs)
    lost = [record for record in records_of(runs) if record["identity"] not in stored]
    assert len(killed) == 1 and len(lost) in (1, 2, 3, 4)  # a group, or the other process's too
    assert told.count("was not run") == len(lost)
    for record in lost:
        config = record["config"]
        name = f"{config['benchmark']} smoke {config['method']} seed {config['seed']}"
        assert told.count(f"{name} was not run: a process was killed") == 1
    assert [found["outcome"] for found in stored.values()] == ["exact"] * (5 - len(lost))

    # `--missing` goes on from there.
    monkeypatch.undo()
    assert main(["--runs", str(runs), "--missing"]) == 0
    assert [found["outcome"] for found in read_replays(runs).values()] == ["exact"] * 5


@pytest.mark.full
def test_ctrl_c_is_left_to_the_process_that_asked(monkeypatch):
    """A terminal sends it to the whole group; the processes bring what is in hand to its end."""
    monkeypatch.setattr(lab, "_replay_group", eval)  # of what another process can import
    group = "[__import__('signal').getsignal(__import__('signal').SIGINT)]"
    handlers = lab._in_processes(deque([group]), jobs=2, stop=lambda: False)
    assert list(handlers) == [signal.SIG_IGN]


def test_data_are_loaded_once_for_records_that_share_them(runs, monkeypatch):
    loads = []
    benchmarks = {name: lab.get_benchmark(name) for name in ("toy", "toy-multi")}

    def counted(name):
        benchmark = benchmarks[name]
        return replace(benchmark, load=lambda *args: loads.append(name) or benchmark.load(*args))

    plain = lab.get_benchmark
    monkeypatch.setattr(lab, "get_benchmark", lambda b: counted(b) if type(b) is str else plain(b))
    replay_all(records_of(runs), runs)
    assert sorted(loads) == ["toy", "toy-multi"]


def test_what_could_not_be_replayed_does_not_replace_what_was(runs, monkeypatch):
    records = records_of(runs)
    replay_all(records[:1], runs)
    before = read_replays(runs)
    monkeypatch.setattr(lab, "get_benchmark", lambda name: replace(toy, load=missing))
    replays = replay_all(records[:2], runs)
    assert {found["outcome"] for found in replays.values()} == {"not run"}
    after = read_replays(runs)
    assert after[records[0]["identity"]] == before[records[0]["identity"]]
    assert after[records[1]["identity"]]["outcome"] == "not run"
    assert is_current(records[0], runs) is True and is_current(records[1], runs) is None


def test_a_stop_before_the_processes_replays_nothing(runs):
    assert replay_all(records_of(runs), runs, jobs=2, stop=lambda: True) == {}
    assert not replays_path(runs).exists()


def test_records_of_other_seeds_have_other_data(runs):
    """A benchmark may draw its data by the seed."""
    records = records_of(runs)
    other = copy.deepcopy(records[0])
    other["config"]["seed"] = 1
    groups = lab._groups([*records[:2], other], size=4)
    assert [len(group) for group in groups] == [2, 1]


def test_what_cannot_be_replayed_replaces_an_outcome_of_other_numbers(runs):
    record = records_of(runs)[0]
    replay_all([record], runs)
    anew = tampered(record, lambda r: r["curves"]["train"]["unit"].__setitem__(1, 9.0))
    anew["device"] = "cuda: NVIDIA H200"
    replay_all([anew], runs)
    assert read_replays(runs)[record["identity"]]["outcome"] == "not run"


@pytest.mark.parametrize(
    "change",
    [
        lambda r: r["curves"]["train"]["unit"].__setitem__(1, 9.0),
        lambda r: r["monitors"]["weights"]["unit"].__setitem__(0, 9.0),
        lambda r: r.update(step=1),
        lambda r: r.update(state="failed"),
    ],
    ids=["curves", "monitors", "step", "state"],
)
def test_a_replay_does_not_speak_for_a_record_that_was_made_anew(runs, change):
    record = records_of(runs)[0]
    replay_all([record], runs)
    assert is_current(record, runs) is True
    assert is_current(tampered(record, change), runs) is None
    found = read_replays(runs)[record["identity"]]
    write_replays({record["identity"]: found | {"outcome": "differs"}}, runs)
    assert is_current(record, runs) is False
    assert is_current({"config": record["config"], "state": "pending"}, runs) is None


def test_outside_of_a_project_nothing_is_known(record, monkeypatch, tmp_path):
    monkeypatch.delenv("DBMTL_OUT", raising=False)
    monkeypatch.chdir(tmp_path)
    assert is_current(record) is None


# -------------------------------------------------------------------------------------- the command


@pytest.mark.full
@pytest.mark.parametrize(
    ("options", "count"),
    [
        (["--benchmark", "toy"], 2),
        (["--benchmark", "toy", "toy-multi", "--method", "STL"], 2),
        (["--scale", "smoke", "--seed", "0"], 4),
        (["--sample", "3"], 3),
        (["--sample", "30", "--method", "EW"], 2),
    ],
)
def test_options_choose_records(runs, options, count, capsys):
    assert main(["--runs", str(runs), *options]) == 0
    assert len(read_replays(runs)) == count


def test_a_sample_depends_on_its_seed_alone(runs, capsys):
    chosen = []
    for seed in (0, 0, 1, 2, 3, 4):
        main(["--runs", str(runs), "--sample", "1", "--seed-of-sample", str(seed)])
        chosen.append(list(read_replays(runs)))
        replays_path(runs).unlink()
    assert chosen[0] == chosen[1] and len({identity for (identity,) in chosen}) > 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--benchmark", "toi"], "unknown benchmark 'toi': did you mean 'toy'?"),
        (["--method", "STLL"], "did you mean 'STL'?"),
        (["--scale", "smok"], "did you mean 'smoke'?"),
        (["--seed", "7"], "unknown seed 7"),
        (["--sample", "0"], "--sample must be a whole number from 1, got 0"),
        (["--jobs", "0"], "--jobs must be a whole number from 1, got 0"),
    ],
)
def test_wrong_options_are_refused(runs, options, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["--runs", str(runs), *options])
    assert message in capsys.readouterr().err and not replays_path(runs).exists()


def test_a_record_that_differs_is_told_by_the_exit_code(runs, monkeypatch, capsys):
    plain = Balancer.backward

    def upward(balancer, *losses, **options):
        plain(balancer, *losses, **options)
        for parameter in balancer.shared:
            parameter.grad.neg_()

    monkeypatch.setattr(Balancer, "backward", upward)
    assert main(["--runs", str(runs), "--method", "EW", "--benchmark", "toy"]) == 1
    shown = capsys.readouterr().out
    assert "toy smoke EW seed 0 differs, first at step 4: " in shown
    (record,) = read_records(runs, benchmark="toy", method="EW")
    assert is_current(record, runs) is False
    assert shown.startswith(replay_table([record], read_replays(runs)))


def test_a_damaged_record_is_told_and_the_others_are_replayed(runs, capsys):
    (path,) = runs.glob("toy/smoke-EW-s0-*.json")
    content = json.loads(path.read_text())
    content["curves"]["train"]["unit"][2] = 0.125  # of an epoch that is not replayed
    path.write_text(json.dumps(content))
    count = len(list(runs.glob("*/*.json")))
    assert main(["--runs", str(runs)]) == 1
    shown = capsys.readouterr().out
    assert f"{path} is damaged, not replayed: its checksum is not that of its content" in shown
    assert len(read_replays(runs)) == count - 1


def test_a_damaged_file_of_outcomes_is_named(runs, capsys):
    lab.replays_path(runs).write_text("{")
    with pytest.raises(ValueError, match="replay.json is damaged .*delete it and replay again"):
        read_replays(runs)
    with pytest.raises(SystemExit, match="2"):
        main(["--runs", str(runs)])
    assert "replay.json is damaged" in capsys.readouterr().err
    with pytest.warns(UserWarning, match="replay.json is damaged"):
        assert is_current(read_records(runs)[0], runs) is None


# -------------------------------------------------------------------------------- committed records


def committed(benchmark, scale, *methods):
    """Records of seed 0, one a method without settings, of the latest protocol that there is."""
    records = read_records(RUNS, benchmark=benchmark, scale=scale, seed=0, hyper={})
    cases = []
    for method in methods:
        of_method = [record for record in records if record["config"]["method"] == method]
        latest = max(of_method, key=lambda record: record["config"]["protocol"])
        cases.append(pytest.param(latest, id=f"{benchmark}-{scale}-{method}"))
    return cases


def assert_replays(record):
    """The numbers are those of today's code, unless its protocol is another one by now."""
    found = replay(record)
    expected = ["older protocol"] if has_older_protocol(record) else ["exact", "close"]
    assert found["outcome"] in expected, found


@pytest.mark.full
@pytest.mark.parametrize(
    "record",
    [
        *committed("qm9", "early", "EW", "loss-only"),
        *committed("cityscapes", "generated", "EW", "DB-MTL"),
    ],
)
def test_todays_code_replays_committed_records(record):
    assert_replays(record)


@pytest.mark.full
@pytest.mark.data
@pytest.mark.parametrize("record", committed("nyuv2", "cpu", "EW"))
def test_todays_code_replays_committed_records_of_real_data(record):
    assert_replays(record)


@pytest.mark.full
@pytest.mark.data
@pytest.mark.slow  # the features of thousands of images are computed once, which takes minutes
@pytest.mark.parametrize(
    "record",
    [
        *committed("office31", "cpu", "EW", "DB-MTL"),
        *committed("office31-sgd", "cpu", "STL", "DB-MTL"),
        *committed("pacs", "cpu", "EW", "DB-MTL"),
    ],
)
def test_todays_code_replays_committed_records_of_frozen_features(record):
    assert_replays(record)


class FeaturesOnDemand:
    """The frozen network's features of some pictures, computed for the rows that are asked for."""

    stores = {}  # of this process: two records see the same pictures
    network = None

    @classmethod
    def of(cls, store, device="cpu"):
        cls.network = cls.network or load_lite0(Lite0())  # now: it draws random numbers
        return cls.stores.setdefault(store.hash, cls(store))

    def __init__(self, store):
        self.images = store.arrays["image"]
        self.rows = {}

    def __len__(self):
        return len(self.images)

    def float(self):
        return self

    def to(self, device):
        return self

    def __getitem__(self, index):
        missing = [row for row in index.tolist() if row not in self.rows]
        if missing:
            features = pooled_features(self.network, self.images[missing], progress=False)
            self.rows |= dict(zip(missing, features.half().float(), strict=True))
        return torch.stack([self.rows[row] for row in index.tolist()])


@pytest.mark.full
@pytest.mark.data
@pytest.mark.parametrize(
    "record",
    [
        *committed("office31", "cpu", "EW", "DB-MTL"),
        *committed("pacs", "cpu", "EW", "DB-MTL"),
    ],
)
def test_todays_code_replays_the_first_monitored_step_on_frozen_features(record, monkeypatch):
    """From a picture to the gradients; a record keeps four digits of what was monitored."""
    monkeypatch.setattr("dbmtl.benchmarks.office.lite0_features", FeaturesOnDemand.of)
    # the features of a machine that has not computed all of them have no hash
    of_store = "dbmtl.benchmarks.office.lite0_features_hash"
    monkeypatch.setattr(of_store, lambda store: store.hash)
    with torch.random.fork_rng(devices=[]):
        run = run_of(record)
        run.advance()
    recorded = {kind: column for kind, column in record["monitors"].items() if kind != "steps"}
    assert set(recorded) >= {"losses", "norms", "cosines"}
    for kind, columns in recorded.items():
        for name, column in columns.items():
            replayed = run.loop.monitors[kind][name][0]
            assert replayed == pytest.approx(column[0], rel=2e-4, abs=2e-4), (kind, name)


def test_the_committed_outcomes_are_of_committed_records(monkeypatch):
    monkeypatch.setenv("DBMTL_OUT", str(RUNS.parents[1]))
    replays = read_replays()
    content = replays_path().read_bytes()
    assert content == encode_record(dict(sorted(replays.items())))
    assert runs_folder("cpu") == RUNS
    known = {record["identity"] for record in read_records(RUNS)}
    assert set(replays) <= known and len(replays) > 0.9 * len(known)
    for found in replays.values():
        assert set(found) <= {
            *("record", "outcome", "reason", "numbers", "worst", "first"),
            *("epochs", "steps", "torch", "features"),
        }

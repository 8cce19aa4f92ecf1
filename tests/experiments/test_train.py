"""Runs: one record each, and runs that can be killed anywhere."""

import os
import re
import signal
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.benchmarks.toy import toy
from dbmtl.core.balancer import Balancer
from dbmtl.experiments import train as lab
from dbmtl.experiments.checkpoints import load_checkpoint, save_checkpoint
from dbmtl.experiments.records import read_records, selected
from dbmtl.experiments.train import Run, resume, train

MACHINE = ("seconds", "commit", "written", "steps_now")


def numbers(record):
    """A record without what may differ between two runs of the same numbers."""
    return {key: value for key, value in record.items() if key not in MACHINE}


def test_training_leaves_the_callers_random_state_alone(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train(toy, "EW", out=tmp_path)
    assert torch.equal(before, torch.get_rng_state())


def test_single_tasks_have_no_gradients_to_compare(tmp_path):
    record = train(toy, "STL", out=tmp_path, monitor_every=5)
    assert (record["monitor_every"], record["monitors"]) == (0, {})


def test_a_record_counts_the_parameters_of_trunk_and_heads(tmp_path):
    data = toy.load(toy.scale("smoke"))
    model = Run(toy, "EW", 0, "smoke", "cpu", None, data).loop.model
    numbers = {name: p.numel() for name, p in model.named_parameters()}
    shared = sum(n for name, n in numbers.items() if name.startswith("trunk."))
    heads = sum(n for name, n in numbers.items() if not name.startswith("trunk."))
    record = train(toy, "EW", out=tmp_path, data=data)
    assert record["parameters"] == {"shared": shared, "heads": heads}


@pytest.mark.parametrize("method", ["EW", "DB-MTL", "STL"])
@pytest.mark.parametrize("name", ["toy", "toy-multi"])
def test_every_benchmark_takes_every_method(name, method, tmp_path):
    record = train(name, method, out=tmp_path)
    assert (
        record["state"] == "finished" and record["steps_now"] == record["steps"] == record["step"]
    )
    assert record["curves"]["epochs"] == [1, 2, 3]
    for split in ("train", "validation", "test"):
        assert list(record["curves"][split]) == ["unit", "large", "small"]
    assert read_records(tmp_path) == [{k: v for k, v in record.items() if k != "steps_now"}]


def test_stl_trains_each_task_as_if_it_were_alone(tmp_path):
    together = train(toy, "STL", out=tmp_path)
    task = toy.tasks[1]
    data = toy.load(toy.scale("smoke"), "cpu", 0)
    alone = train(replace(toy, name="alone", tasks=(task,)), "EW", out=tmp_path, data=data)
    for split in ("train", "validation", "test"):
        assert together["curves"][split]["large"] == alone["curves"][split]["large"]
    assert (
        together["selected"]["best validation epoch"]["epoch"]["large"]
        == alone["selected"]["best validation epoch"]["epoch"]
    )


def test_the_best_epoch_is_one_of_the_curves(tmp_path):
    record = train(toy, "EW", out=tmp_path)
    assert list(record["selected"]) == ["best validation epoch", "average of the last ten epochs"]
    epoch = record["selected"]["best validation epoch"]["epoch"]
    assert selected(record)["large"]["MAE"] == record["curves"]["test"]["large"]["MAE"][epoch - 1]


def test_a_benchmark_without_validation_is_refused(tmp_path):
    def load(*args):
        return replace(toy.load(*args), validation=None)

    with pytest.raises(ValueError, match="there is no validation part"):
        train(replace(toy, name="blind", load=load), "EW", out=tmp_path)
    assert not list(tmp_path.glob("*/*.json"))


def test_a_learning_rate_of_the_run_is_that_of_its_optimizer(tmp_path):
    size = toy.scale("smoke")
    slow = replace(toy, scales={"smoke": replace(size, learning_rate=3e-4)})
    by_scale = train(slow, "DB-MTL", out=tmp_path / "scale", hyper={"beta": 0.1})
    settings = {"beta": 0.1, "learning_rate": 3e-4}
    by_setting = train(toy, "DB-MTL", out=tmp_path / "setting", hyper=settings)
    assert by_setting["curves"] == by_scale["curves"]
    assert by_setting["config"]["hyper"] == settings
    assert by_setting["identity"] != by_scale["identity"]
    plain = train(toy, "DB-MTL", out=tmp_path / "plain", hyper={"beta": 0.1})
    assert plain["curves"] != by_setting["curves"]


def test_the_hash_without_features_is_in_the_record_where_there_are_features(tmp_path):
    data = toy.load(toy.scale("smoke"))
    assert "source_hash" not in train(toy, "EW", out=tmp_path / "a", data=data)["data"]
    record = train(toy, "EW", out=tmp_path / "b", data=replace(data, source_hash="pictures"))
    assert record["data"]["source_hash"] == "pictures"


@pytest.mark.full
@pytest.mark.parametrize("method", ["EW", "DB-MTL", "STL"])
@pytest.mark.parametrize("name", ["toy", "toy-multi"])
def test_a_run_stopped_at_many_steps_gives_the_same_record(name, method, tmp_path):
    whole = train(name, method, out=tmp_path / "whole", monitor_every=4)
    stops = [1, 5, 6, 7, 12] if method != "STL" else [1, 14, 15, 16, 24]
    steps = 0
    for stop in stops + [10_000]:
        count = iter(range(10_000))
        part = train(
            name,
            method,
            out=tmp_path / "parts",
            monitor_every=4,
            stop=lambda c=count, s=stop, b=steps: next(c) == s - b,
        )
        if part["state"] == "stopped":
            assert part["step"] == min(stop, part["steps"]) and not list(
                (tmp_path / "parts").glob("*.json")
            )
            steps = part["step"]
    assert part["state"] == "finished" and numbers(part) == numbers(whole)
    assert part["seconds"]["sessions"] > 1
    assert [
        p.suffix for p in (tmp_path / "parts/checkpoints").iterdir() if p.suffix.startswith(".p")
    ] == []


@pytest.mark.parametrize("method", ["DB-MTL", "STL"])
def test_weights_after_resuming_are_equal_to_the_last_bit(method, tmp_path):
    data = toy.load(toy.scale("smoke"))
    torch.manual_seed(0)
    whole = Run(toy, method, 0, "smoke", "cpu", None, data)
    while whole.step < 17:
        whole.advance()
    kept = {k: v.clone() for k, v in whole.loop.model.state_dict().items()}
    part = Run(toy, method, 0, "smoke", "cpu", None, data)
    for stop in (4, 9, 11):
        while part.step < stop:
            part.advance()
        save_checkpoint(tmp_path / "run.pt", part.state_dict())
        torch.randn(7)  # the process draws random numbers of its own
        part = Run(toy, method, 0, "smoke", "cpu", None, data)
        resume(part, load_checkpoint(tmp_path / "run.pt"))
    while part.step < 17:
        part.advance()
    assert all(torch.equal(value, kept[key]) for key, value in part.loop.model.state_dict().items())
    assert torch.equal(part.loop.sums, whole.loop.sums) and part.loop.rows == whole.loop.rows


CHILD = """
import os, signal, sys
import torch._dynamo  # which an optimizer imports; once for all
from dbmtl.experiments.checkpoints import load_checkpoint
from dbmtl.experiments.train import train
torch.set_num_threads(1)

def victim(out, kind, at):
    count = [0]
    def die():
        count[0] += 1
        if count[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
    def dying(real):
        def call(*args):
            die()
            return real(*args)
        return call
    if kind == "fsync":  # the new checkpoint is written, not yet in place
        os.fsync = dying(os.fsync)
    if kind == "replace":  # between the old one's move and the new one's
        os.replace = dying(os.replace)
    options = {"stop": die} if kind == "step" else {}
    train("toy", "DB-MTL", seed=3, out=out, monitor_every=5, checkpoint_steps=2, **options)

for deed in sys.argv[3:]:
    kind, at = deed.split(":")
    child = os.fork()
    if child == 0:
        victim(sys.argv[1], kind, int(at))
    status = os.waitpid(child, 0)[1]
    print(os.waitstatus_to_exitcode(status), load_checkpoint(sys.argv[2])["step"])
"""


@pytest.mark.full
def test_a_process_killed_at_any_moment_loses_nothing(tmp_path):
    """SIGKILL at three steps, in the middle of a checkpoint write, and between its two renames."""
    whole = train("toy", "DB-MTL", seed=3, out=tmp_path / "whole", monitor_every=5)
    out = tmp_path / "killed"
    path = out / "checkpoints" / f"{whole['identity']}.pt"
    deeds = ["step:4", "fsync:2", "step:4", "replace:6", "step:5"]
    run = subprocess.run(
        [sys.executable, "-c", CHILD, out, path, *deeds], capture_output=True, text=True
    )
    deaths = [[int(word) for word in line.split()] for line in run.stdout.splitlines()]
    assert [code for code, _ in deaths] == [-signal.SIGKILL] * 5, run.stderr
    steps = [step for _, step in deaths]
    assert steps == sorted(steps) and steps[0] >= 2 and not list(out.glob("*/*.json"))
    rest = train("toy", "DB-MTL", seed=3, out=out, monitor_every=5)
    assert rest["steps_now"] == rest["steps"] - steps[-1] < rest["steps"] - 6
    assert numbers(rest) == numbers(whole)
    assert {p.suffix or p.name for p in (out / "checkpoints").iterdir()} == {".gitignore", ".lock"}


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path, stopped):
    _, path = stopped()
    other = Run(toy, "EW", 1, "smoke", "cpu", None, toy.load(toy.scale("smoke")))
    path.rename(path.with_name(f"{other.identity}.pt"))
    with pytest.raises(ValueError, match="is of another run: its seed differ"):
        train("toy", "EW", seed=1, out=tmp_path)


def test_a_checkpoint_of_other_data_is_refused():
    run = Run(toy, "EW", 0, "smoke", "cpu", None, toy.load(toy.scale("smoke")))
    other = Run(toy, "EW", 0, "smoke", "cpu", None, replace(run.data, hash="0"))
    with pytest.raises(ValueError, match="its data differ"):
        resume(run, other.state_dict())


def test_a_checkpoint_of_another_kind_of_device_is_refused():
    run = Run(toy, "EW", 0, "smoke", "cpu", None, toy.load(toy.scale("smoke")))
    with pytest.raises(ValueError, match="made on cuda:0, not cpu"):
        resume(run, run.state_dict() | {"device": "cuda:0"})


def test_a_record_holds_the_commits_of_all_code_that_trained_it(tmp_path, stopped, monkeypatch):
    machine = lab.environment()
    monkeypatch.setattr(lab, "environment", lambda device: machine | {"commit": "one"})
    stopped()
    monkeypatch.setattr(lab, "environment", lambda device: machine | {"commit": "two-dirty"})
    record = train("toy", "EW", out=tmp_path)
    assert record["commit"] == "one, two-dirty"
    assert not {"code", "code_modules"} & set(record)


@pytest.mark.parametrize("method", ["DB-MTL", "STL", "DWA"])
def test_a_checkpoint_in_which_tasks_were_numbers_is_resumed(tmp_path, stopped, method):
    """The balancer used to be given a list of losses."""
    whole = train("toy", method, out=tmp_path / "whole")
    _, path = stopped(method)
    state = load_checkpoint(path)
    balancer = state["loop"]["balancer"]
    balancer["names"] = tuple(range(len(balancer["names"])))
    save_checkpoint(path, state)
    rest = train("toy", method, out=tmp_path)
    assert rest["steps_now"] == rest["steps"] - 3 and numbers(rest) == numbers(whole)


def test_a_checkpoint_of_before_replays_is_resumed(tmp_path, stopped):
    """Checkpoints used to hold a hash of source text."""
    whole = train("toy", "EW", out=tmp_path / "whole")
    _, path = stopped()
    save_checkpoint(path, load_checkpoint(path) | {"code": "0123456789ab"})
    rest = train("toy", "EW", out=tmp_path)
    assert rest["steps_now"] == 18 - 3 and numbers(rest) == numbers(whole)


def test_a_resumed_run_keeps_its_interval_of_monitors(tmp_path, stopped):
    whole = train("toy", "EW", out=tmp_path / "whole", monitor_every=2)
    stopped(monitor_every=2)
    rest = train("toy", "EW", out=tmp_path, monitor_every=0)
    assert rest["steps_now"] == 18 - 3 and rest["monitor_every"] == 2
    assert rest["monitors"] == whole["monitors"]


def test_a_budget_stops_at_a_checkpoint(tmp_path):
    part = train("toy", "EW", out=tmp_path, budget=0.0)
    assert (part["state"], part["steps_now"]) == ("stopped", 1)
    assert train("toy", "EW", out=tmp_path, budget=60.0)["state"] == "finished"


def test_a_budget_below_the_time_to_set_up_takes_a_step_a_call(tmp_path):
    whole = train("toy", "EW", out=tmp_path / "whole")
    parts = [train("toy", "EW", out=tmp_path, budget=1e-9) for _ in range(18)]
    assert [part["step"] for part in parts] == list(range(1, 19))
    assert [part["state"] for part in parts] == ["stopped"] * 17 + ["finished"]
    assert parts[-1]["curves"] == whole["curves"]


def test_a_stop_takes_no_step(tmp_path):
    part = train("toy", "EW", out=tmp_path, stop=lambda: True)
    assert (part["state"], part["steps_now"]) == ("stopped", 0)


@pytest.mark.parametrize("seed", [-1, 2**32, 10**30, 1.5, True, "0"])
def test_a_seed_that_no_generator_takes_is_refused(tmp_path, seed):
    with pytest.raises(ValueError, match="seed must be .*got"):
        train("toy", "EW", seed=seed, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_largest_seed_runs(tmp_path):
    assert train("toy", "EW", seed=2**32 - 1, out=tmp_path)["state"] == "finished"


def test_a_negative_interval_of_monitors_is_refused(tmp_path):
    with pytest.raises(ValueError, match="monitor_every must be a whole number from 0, got -3"):
        train("toy", "EW", out=tmp_path, monitor_every=-3)


def test_options_of_the_balancer_are_no_settings(tmp_path):
    message = "has no setting 'check'; its settings: eps, alpha, weights, shrinkage, beta"
    with pytest.raises(ValueError, match=message):
        train("toy", "DB-MTL", out=tmp_path, hyper={"check": "off"})


def broken(error=None, value=1.0, at=4):
    calls = []

    def loss(prediction, target):
        calls.append(1)
        if len(calls) == at and error is not None:
            raise error
        return (prediction - target).square().mean() * (value if len(calls) == at else 1.0)

    return replace(
        toy, name="broken", tasks=(toy.tasks[0], replace(toy.tasks[1], loss=loss), toy.tasks[2])
    )


@pytest.mark.parametrize("method", ["EW", "DB-MTL"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_is_a_result(tmp_path, value, method):
    record = train(broken(value=value), method, out=tmp_path)
    assert (record["state"], record["step"], record["steps_now"]) == ("diverged", 3, 3)
    assert record["reason"] == f"the loss of task 'large' is {value}"
    assert record["selected"] == {} and record["curves"] == {"epochs": []}
    assert len(read_records(tmp_path, state="diverged")) == 1


def test_a_divergence_keeps_the_curves_until_then(tmp_path):
    record = train(broken(value=float("nan"), at=9), "EW", out=tmp_path)
    assert record["curves"]["epochs"] == [1] and record["step"] == 8


def test_an_stl_run_diverges_in_one_task(tmp_path):
    record = train(broken(value=float("nan"), at=9), "STL", out=tmp_path)
    assert record["state"] == "diverged" and record["reason"] == "the loss of task 'large' is nan"
    assert (
        len(record["curves"]["train"]["unit"]) == 3 and len(record["curves"]["train"]["large"]) == 1
    )


@pytest.mark.parametrize("method", ["DB-MTL", "UW", "GLS", "EW+log", "IMTL-L"])
@pytest.mark.parametrize("name", ["toy", "toy-multi"])
def test_a_failure_names_the_task(tmp_path, method, name):
    """A negative loss has no logarithm, and no uncertainty."""
    negative = get_benchmark(name)
    tasks = list(negative.tasks)
    tasks[1] = replace(tasks[1], loss=lambda prediction, target: -prediction.square().mean())
    record = train(replace(negative, name="negative", tasks=tuple(tasks)), method, out=tmp_path)
    assert record["state"] == "failed"
    assert re.match(r"ValueError: the loss of task 'large' is -\d", record["reason"])


def test_several_losses_that_are_not_finite_are_all_named(tmp_path):
    wild = broken(value=float("nan"), at=4)
    first = replace(wild.tasks[0], loss=broken(value=float("inf"), at=4).tasks[1].loss)
    record = train(replace(wild, tasks=(first, *wild.tasks[1:])), "EW", out=tmp_path)
    assert record["reason"] == "the loss of task 'unit' is inf, the loss of task 'large' is nan"


def raising(monkeypatch, error):
    """From its fourth step on, equal weighting raises."""
    plain, calls = Balancer.backward, []

    def backward(balancer, losses, **options):
        calls.append(None)
        if len(calls) > 3:
            raise error
        return plain(balancer, losses, **options)

    monkeypatch.setattr(Balancer, "backward", backward)


def test_a_solver_that_raises_is_a_failed_run(tmp_path, monkeypatch):
    raising(monkeypatch, RuntimeError("no convergence"))
    record = train(toy, "EW", out=tmp_path)
    assert (record["state"], record["reason"], record["step"]) == (
        "failed",
        "RuntimeError: no convergence",
        3,
    )


def test_a_floating_point_error_of_a_solver_is_divergence(tmp_path, monkeypatch):
    raising(monkeypatch, FloatingPointError("overflow in the solver"))
    record = train(toy, "EW", out=tmp_path)
    assert (record["state"], record["reason"], record["step"]) == (
        "diverged",
        "overflow in the solver",
        3,
    )


@pytest.mark.parametrize(
    "error",
    [
        AttributeError("a bug"),
        torch.OutOfMemoryError("full"),
        getattr(torch, "AcceleratorError", torch.OutOfMemoryError)("an illegal memory access"),
        RuntimeError(
            "[enforce fail at alloc_cpu.cpp:127] DefaultCPUAllocator: can't allocate memory"
        ),
        RuntimeError("CUDA error: out of memory"),
    ],
)
def test_memory_that_ran_out_in_the_balancer_is_no_result(tmp_path, monkeypatch, error):
    raising(monkeypatch, error)
    with pytest.raises(type(error), match=re.escape(str(error))):
        train(toy, "EW", out=tmp_path, checkpoint_steps=2)
    assert not list(tmp_path.glob("*/*.json")) and len(list(tmp_path.glob("checkpoints/*.pt"))) == 1


def test_no_checkpoint_is_written_where_the_record_follows(tmp_path, monkeypatch):
    stored = []
    monkeypatch.setattr(lab, "save_checkpoint", lambda path, state: stored.append(state["step"]))
    record = train(toy, "EW", out=tmp_path, checkpoint_steps=6)
    assert record["steps"] == 18
    assert stored == [6, 12]


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ValueError("a bug"), ZeroDivisionError("a bug")]
)
def test_an_error_outside_the_balancer_passes_on_and_the_run_can_go_on(tmp_path, error):
    with pytest.raises(type(error), match="a bug"):
        train(broken(error), "EW", out=tmp_path, checkpoint_steps=2)
    assert not list(tmp_path.glob("*/*.json"))
    assert train(broken(), "EW", out=tmp_path)["steps_now"] == 18 - 2


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["EW", "DB-MTL", "STL"])
def test_a_run_on_cuda_stops_and_resumes(method, tmp_path, stopped):
    whole = train("toy", method, device="cuda", out=tmp_path / "whole")
    part, _ = stopped(method, device="cuda")
    rest = train("toy", method, device="cuda", out=tmp_path)
    assert part["state"] == "stopped" and rest["steps_now"] == rest["steps"] - 3
    for name in toy.task_names:
        assert_close(
            torch.tensor(rest["curves"]["train"][name]),
            torch.tensor(whole["curves"]["train"][name]),
            rtol=1e-3,
            atol=0,
        )
    assert rest["device"].startswith("cuda: ") and os.environ.get("CUDA_VISIBLE_DEVICES") != ""

"""The training loop: one route for all methods, and runs that can be killed anywhere."""

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
from dbmtl.benchmarks.toy import toy, toy_multi
from dbmtl.core.balancer import Balancer
from dbmtl.core.task_gradients import task_gradients
from dbmtl.experiments import train as lab
from dbmtl.experiments.metrics import improvements, select
from dbmtl.experiments.records import read_records, selected
from dbmtl.experiments.train import (
    Run,
    epoch_batches,
    load_checkpoint,
    resume,
    save_checkpoint,
    train,
)

MACHINE = ("seconds", "commit", "steps_now")


def numbers(record):
    """A record without what may differ between two runs of the same numbers."""
    return {key: value for key, value in record.items() if key not in MACHINE}


def without_validation(benchmark):
    return replace(
        benchmark,
        name="blind",
        schedule_on="epoch",
        scheduler=None,
        load=lambda *args: replace(benchmark.load(*args), validation=None, floors_validation={}),
    )


# ------------------------------------------------------------------------------------------------------- batches


@pytest.mark.parametrize("drop_last", [False, True])
def test_batches_of_an_epoch_cover_the_data_once(drop_last):
    batches = epoch_batches(50, 8, torch.Generator().manual_seed(3), drop_last=drop_last)
    drawn = torch.cat(batches).tolist()
    assert len(drawn) == len(set(drawn)) == (48 if drop_last else 50)


def test_short_tasks_cycle_with_fresh_permutations():
    batches = epoch_batches(10, 5, torch.Generator().manual_seed(0), steps=6, drop_last=True)
    passes = [torch.cat(batches[i : i + 2]).tolist() for i in (0, 2, 4)]
    assert all(sorted(p) == list(range(10)) for p in passes)
    assert passes[0] != passes[1] != passes[2]


def test_a_task_smaller_than_a_batch_gives_all_it_has():
    assert [
        len(b)
        for b in epoch_batches(3, 8, torch.Generator().manual_seed(0), steps=2, drop_last=True)
    ] == [3, 3]


def test_multi_input_epochs_are_as_long_as_the_longest_task_needs():
    data = toy_multi.load(toy_multi.scale("smoke"))  # 90, 54 and 27 samples
    run = Run(toy_multi, "EW", 0, "smoke", "cpu", None, data)
    assert run.steps == 3 * max(90 // 16, 54 // 16, 27 // 16)
    assert {name: len(batches) for name, batches in run.loop.orders[0].items()} == dict.fromkeys(
        run.loop.names, 5
    )
    assert Run(toy_multi, "STL", 0, "smoke", "cpu", None, data).steps == 3 * (
        90 // 16 + 54 // 16 + 27 // 16
    )


def test_every_epoch_has_another_order_and_every_seed_too():
    data = toy.load(toy.scale("smoke"))
    run = Run(toy, "EW", 0, "smoke", "cpu", None, data)
    first = torch.cat(run.loop.orders[0][None])
    for _ in range(run.loop.steps):
        run.advance()
    assert not torch.equal(first, torch.cat(run.loop.orders[0][None]))
    assert not torch.equal(
        first, torch.cat(Run(toy, "EW", 1, "smoke", "cpu", None, data).loop.orders[0][None])
    )
    assert torch.equal(
        first, torch.cat(Run(toy, "DB-MTL", 0, "smoke", "cpu", None, data).loop.orders[0][None])
    )


# ----------------------------------------------------------------------------------------------- the loop itself


def test_equal_weighting_is_plain_training(tmp_path):
    """The loop against ten lines of PyTorch that do the same."""
    scale, data = toy.scale("smoke"), toy.load(toy.scale("smoke"))
    record = train(toy, "EW", seed=5, out=tmp_path, data=data)
    torch.manual_seed(5)
    model = toy.network(scale, data, toy.task_names)
    optimizer, order, means = (
        toy.optimizer(model.parameters(), scale),
        torch.Generator().manual_seed(5),
        [],
    )
    for _ in range(scale.epochs):
        total = torch.zeros(3, dtype=torch.float64)
        for index in torch.randperm(90, generator=order).split(16):
            predictions = model(data.train.inputs[index])
            losses = torch.stack(
                [(predictions[n] - y[index]).square().mean() for n, y in data.train.targets.items()]
            )
            optimizer.zero_grad()
            losses.sum().backward()
            optimizer.step()
            total += losses.detach()
        means.append(total / 6)
    for t, name in enumerate(toy.task_names):
        assert_close(
            torch.tensor(record["curves"]["train"][name]),
            torch.stack(means)[:, t].float(),
            rtol=1e-5,
            atol=0,
        )


def test_training_leaves_the_callers_random_state_alone(tmp_path):
    torch.manual_seed(1)
    before = torch.get_rng_state()
    train(toy, "EW", out=tmp_path)
    assert torch.equal(before, torch.get_rng_state())


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


@pytest.mark.parametrize("name", ["toy", "toy-multi"])
def test_stl_trains_each_task_as_if_it_were_alone(name, tmp_path):
    benchmark = get_benchmark(name)
    together = train(benchmark, "STL", out=tmp_path)
    task = benchmark.tasks[1]
    data = benchmark.load(benchmark.scale("smoke"), "cpu", 0)
    alone = train(replace(benchmark, name="alone", tasks=(task,)), "EW", out=tmp_path, data=data)
    for split in ("train", "validation", "test"):
        assert together["curves"][split]["large"] == alone["curves"][split]["large"]
    assert (
        together["selected"]["best validation epoch"]["epoch"]["large"]
        == alone["selected"]["best validation epoch"]["epoch"]
    )


def test_the_schedule_on_validation_gets_delta_p(tmp_path):
    got = []

    class Spy:
        def __init__(self, optimizer):
            self.optimizer = optimizer

        def step(self, *args):
            got.append(args)

        def state_dict(self):
            return {}

    record = train(
        replace(toy, scheduler=lambda optimizer, scale: Spy(optimizer)), "EW", out=tmp_path
    )
    errors = [
        [record["curves"]["validation"][n]["MAE"][e] for n in toy.task_names] for e in range(3)
    ]
    expected = [
        sum(100 * (1 - now / first) for now, first in zip(row, errors[0], strict=True)) / 3
        for row in errors
    ]
    assert_close(torch.tensor([a[0] for a in got]), torch.tensor(expected), rtol=1e-3, atol=1e-3)
    got.clear()
    train(
        replace(toy, scheduler=lambda optimizer, scale: Spy(optimizer), schedule_on="epoch"),
        "EW",
        out=tmp_path,
    )
    assert got == [()] * 3


def test_learned_scales_join_the_optimizer(monkeypatch):
    data, make = toy.load(toy.scale("smoke")), lab.make_balancer
    learned = torch.nn.Parameter(torch.ones(3))

    def balanced(name, **options):
        balancer = make(name, **options)
        monkeypatch.setattr(balancer, "parameters", lambda: iter([learned]), raising=False)
        return balancer

    monkeypatch.setattr(lab, "make_balancer", balanced)
    run = Run(toy, "EW", 0, "smoke", "cpu", None, data)
    assert any(p is learned for group in run.loop.optimizer.param_groups for p in group["params"])


def test_evaluation_is_in_evaluation_mode_and_leaves_training_mode(tmp_path):
    data = toy.load(toy.scale("smoke"))
    model = toy.network(toy.scale("smoke"), data, toy.task_names).train()
    one, two = (lab.evaluate(model, toy.tasks, data.test, 16) for _ in range(2))
    assert one == two and model.training and model.trunk.training


# ------------------------------------------------------------------------------------------------------ monitors


@pytest.mark.parametrize("method", ["EW", "DB-MTL"])
@pytest.mark.parametrize("name", ["toy", "toy-multi"])
def test_monitors_do_not_change_the_numbers(name, method, tmp_path):
    watched = train(name, method, out=tmp_path / "a", monitor_every=4)
    plain = train(name, method, out=tmp_path / "b")
    assert watched["curves"] == plain["curves"] and plain["monitors"] == {}
    count = -(-watched["steps"] // 4)
    assert watched["monitors"]["steps"] == [4 * i for i in range(count)]
    assert [len(column) for column in watched["monitors"]["norms"].values()] == [count] * 3
    assert list(watched["monitors"]["cosines"]) == ["unit|large", "unit|small", "large|small"]


def test_monitors_show_raw_gradients(tmp_path):
    record = train(toy, "DB-MTL", out=tmp_path, monitor_every=100)
    data = toy.load(toy.scale("smoke"))
    run = Run(toy, "EW", 0, "smoke", "cpu", None, data)
    losses = lab.task_losses(
        run.loop.model, toy.tasks, lab.draw(data.train, {None: run.loop.orders[0][None][0]})
    )
    rows = task_gradients(losses, list(run.loop.model.trunk.parameters())).shared
    flat = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
    found = torch.tensor([column[0] for column in record["monitors"]["norms"].values()])
    assert_close(found, flat.norm(dim=1), rtol=1e-3, atol=0)
    angles = torch.nn.functional.cosine_similarity(flat[[0, 0, 1]], flat[[1, 2, 2]])
    assert_close(
        torch.tensor([c[0] for c in record["monitors"]["cosines"].values()]),
        angles,
        rtol=1e-3,
        atol=1e-4,
    )
    assert_close(
        torch.tensor([c[0] for c in record["monitors"]["losses"].values()]),
        torch.stack(losses).detach(),
        rtol=1e-3,
        atol=0,
    )


# ---------------------------------------------------------------------------------------------------- selections


def rows(validation, test):
    both = zip(validation, test, strict=True)
    return [
        {
            "train": {},
            "validation": None if v is None else {"a": {"Acc": v}, "b": {"MAE": 1.0}},
            "test": {"a": {"Acc": t}, "b": {"MAE": t}},
        }
        for v, t in both
    ]


DIRECTIONS = {"a": {"Acc": "up"}, "b": {"MAE": "down"}}


def test_best_epoch_is_chosen_on_validation_and_reported_on_test():
    choice = select([rows([10, 30, 20, 30], [1, 2, 3, 4])], DIRECTIONS)
    best = choice["best validation epoch"]
    assert (best["epoch"], best["delta_p"]) == (2, 100.0)  # a: +200 %, b: 0; of equals the first
    assert best["test"] == {"a": {"Acc": 2}, "b": {"MAE": 2}}


def test_without_validation_the_label_says_test():
    choice = select([rows([None] * 3, [1.0, 4.0, 2.0])], DIRECTIONS)
    assert list(choice) == ["best test epoch", "average of the last ten epochs"]
    assert (
        choice["best test epoch"]["epoch"] == 1
    )  # a and b cancel: 0, then (300 - 300) / 2 = 0: the first of equals
    assert (
        "validation" not in choice or choice["average of the last ten epochs"]["validation"] == {}
    )


def test_average_is_of_the_last_ten_epochs():
    choice = select([rows(range(1, 13), range(1, 13))], DIRECTIONS)[
        "average of the last ten epochs"
    ]
    assert choice["epochs"] == 10 and choice["test"]["a"]["Acc"] == sum(range(3, 13)) / 10


def test_stl_networks_choose_their_epochs_one_by_one():
    parts = [
        [{"validation": {n: {"MAE": v}}, "test": {n: {"MAE": 10 * v}}} for v in values]
        for n, values in (("a", [3.0, 1.0, 2.0]), ("b", [3.0, 2.0, 1.0]))
    ]
    best = select(parts, {"a": {"MAE": "down"}, "b": {"MAE": "down"}})["best validation epoch"]
    assert best["epoch"] == {"a": 2, "b": 3} and best["test"] == {
        "a": {"MAE": 10.0},
        "b": {"MAE": 10.0},
    }


def test_a_metric_that_starts_at_zero_is_left_out_of_the_choice():
    given = rows([0.0, 50.0, 10.0], [1.0, 2.0, 3.0])
    given[2]["validation"]["b"]["MAE"] = 0.5
    assert improvements(given, DIRECTIONS) == [0.0, 0.0, 50.0]
    for row in given:
        row["validation"]["b"]["MAE"] = 0.0
    assert improvements(given, DIRECTIONS) == [0.0, 0.0, 0.0]


def test_a_benchmark_without_validation_runs(tmp_path):
    record = train(without_validation(toy), "EW", out=tmp_path)
    assert list(record["selected"]) == ["best test epoch", "average of the last ten epochs"]
    assert "validation" not in record["curves"]
    epoch = record["selected"]["best test epoch"]["epoch"]
    assert selected(record)["large"]["MAE"] == record["curves"]["test"]["large"]["MAE"][epoch - 1]


# --------------------------------------------------------------------------------------------- stop and continue


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
from dbmtl.experiments import records
from dbmtl.experiments import train
torch.set_num_threads(1)

def victim(out, kind, at):
    count = [0]
    def die():
        count[0] += 1
        if count[0] == at: os.kill(os.getpid(), signal.SIGKILL)
    def dying(real):
        def call(*args):
            die()
            return real(*args)
        return call
    if kind == "fsync": records.os.fsync = dying(os.fsync)  # the new checkpoint is written, not yet in place
    if kind == "replace": os.replace = dying(os.replace)    # between the old one's move and the new one's
    options = {"stop": die} if kind == "step" else {}
    train.train("toy", "DB-MTL", seed=3, out=out, monitor_every=5, checkpoint_steps=2, **options)

for deed in sys.argv[3:]:
    kind, at = deed.split(":")
    child = os.fork()
    if child == 0: victim(sys.argv[1], kind, int(at))
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), train.load_checkpoint(sys.argv[2])["step"])
"""


def test_a_process_killed_at_any_moment_loses_nothing(tmp_path):
    """SIGKILL at three steps, in the middle of a checkpoint write, and between its two renames."""
    whole = train("toy", "DB-MTL", seed=3, out=tmp_path / "whole", monitor_every=5)
    out = tmp_path / "killed"
    path, deeds = (
        out / "checkpoints" / f"{whole['identity']}.pt",
        ["step:4", "fsync:2", "step:4", "replace:6", "step:5"],
    )
    run = subprocess.run(
        [sys.executable, "-c", CHILD, out, path, *deeds], capture_output=True, text=True
    )
    deaths = [[int(word) for word in line.split()] for line in run.stdout.splitlines()]
    assert [code for code, _ in deaths] == [-signal.SIGKILL] * 5, run.stderr
    steps = [step for _, step in deaths]
    assert steps == sorted(steps) and steps[0] >= 2 and not list(out.glob("*.json"))
    rest = train("toy", "DB-MTL", seed=3, out=out, monitor_every=5)
    assert rest["steps_now"] == rest["steps"] - steps[-1] < rest["steps"] - 6
    assert numbers(rest) == numbers(whole)
    assert {p.suffix or p.name for p in (out / "checkpoints").iterdir()} == {".gitignore", ".lock"}


# --------------------------------------------------------------------------------------------------- checkpoints


def stopped(tmp_path, method="EW", seed=0, **options):
    calls = iter(range(100))
    part = train("toy", method, seed=seed, out=tmp_path, stop=lambda: next(calls) == 3, **options)
    return part, tmp_path / "checkpoints" / f"{part['identity']}.pt"


@pytest.mark.parametrize("keep", [0, 1, 64, 66, 500, -1])
def test_a_truncated_checkpoint_names_its_file(tmp_path, keep):
    _, path = stopped(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ValueError, match="delete it.*--fresh") as caught:
        train("toy", "EW", out=tmp_path)
    assert path.name in str(caught.value)
    assert train("toy", "EW", out=tmp_path, fresh=True)["steps_now"] == 18


def test_a_flipped_bit_is_noticed_and_the_previous_checkpoint_used(tmp_path):
    whole = train("toy", "EW", out=tmp_path / "whole")
    _, path = stopped(tmp_path, checkpoint_steps=1)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    with pytest.warns(UserWarning, match="is damaged; going on from the previous one"):
        rest = train("toy", "EW", out=tmp_path)
    assert (
        rest["steps_now"] == 18 - 3 and rest["curves"] == whole["curves"]
    )  # stored at 1, 2, 3 and when told to stop


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path):
    part, path = stopped(tmp_path)
    other = (
        part["identity"],
        Run(toy, "EW", 1, "smoke", "cpu", None, toy.load(toy.scale("smoke"))).identity,
    )
    path.rename(path.with_name(f"{other[1]}.pt"))
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


def test_resuming_with_other_code_makes_a_stale_record(tmp_path, monkeypatch):
    stopped(tmp_path)
    monkeypatch.setattr(lab, "fingerprint", lambda modules: "changed")
    assert train("toy", "EW", out=tmp_path)["code"] == "mixed"


def test_a_finished_run_leaves_no_checkpoint_and_git_ignores_the_folder(tmp_path):
    _, path = stopped(tmp_path)
    assert path.exists() and (path.parent / ".gitignore").read_text() == "*\n"
    train("toy", "EW", out=tmp_path)
    assert [p.suffix for p in path.parent.iterdir() if p.name != ".gitignore"] == [".lock"]


def test_two_processes_do_not_work_on_one_run(tmp_path):
    data = toy.load(toy.scale("smoke"))
    errors = []

    def nested():
        try:
            train("toy", "EW", out=tmp_path, data=data)
        except BlockingIOError as error:
            errors.append(str(error))
        return True

    train("toy", "EW", out=tmp_path, data=data, stop=nested)
    assert len(errors) == 1 and "another process works on" in errors[0]


def test_a_budget_stops_at_a_checkpoint(tmp_path):
    part = train("toy", "EW", out=tmp_path, budget=0.0)
    assert (part["state"], part["steps_now"]) == ("stopped", 0)
    assert train("toy", "EW", out=tmp_path, budget=60.0)["state"] == "finished"


# ------------------------------------------------------------------------------------------------------- failure


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
    assert (
        "large" in record["reason"]
        and record["selected"] == {}
        and record["curves"] == {"epochs": []}
    )
    assert len(read_records(tmp_path, state="diverged")) == 1


def test_a_divergence_keeps_the_curves_until_then(tmp_path):
    record = train(broken(value=float("nan"), at=9), "EW", out=tmp_path)
    assert record["curves"]["epochs"] == [1] and record["step"] == 8


def test_an_stl_run_diverges_in_one_task(tmp_path):
    record = train(broken(value=float("nan"), at=9), "STL", out=tmp_path)
    assert record["state"] == "diverged" and record["reason"] == "the loss of large is not finite"
    assert (
        len(record["curves"]["train"]["unit"]) == 3 and len(record["curves"]["train"]["large"]) == 1
    )


def test_a_metric_that_is_not_finite_is_divergence(tmp_path, monkeypatch):
    monkeypatch.setattr(
        lab, "evaluate", lambda *_: {n: {"MAE": float("nan")} for n in toy.task_names}
    )
    record = train(toy, "EW", out=tmp_path)
    assert (
        record["state"] == "diverged"
        and "unit MAE is nan at the end of epoch 1" in record["reason"]
    )


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
    assert not list(tmp_path.glob("*.json")) and len(list(tmp_path.glob("checkpoints/*.pt"))) == 1


@pytest.mark.parametrize(
    "error", [RuntimeError("a bug"), ValueError("a bug"), ZeroDivisionError("a bug")]
)
def test_an_error_outside_the_balancer_passes_on_and_the_run_can_go_on(tmp_path, error):
    with pytest.raises(type(error), match="a bug"):
        train(broken(error), "EW", out=tmp_path, checkpoint_steps=2)
    assert not list(tmp_path.glob("*.json"))
    assert train(broken(), "EW", out=tmp_path)["steps_now"] == 18 - 2


@pytest.mark.cuda
@pytest.mark.parametrize("method", ["EW", "DB-MTL", "STL"])
def test_a_run_on_cuda_stops_and_resumes(method, tmp_path):
    whole = train("toy", method, device="cuda", out=tmp_path / "whole")
    part, _ = stopped(tmp_path, method, device="cuda")
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


def test_a_bar_is_no_condition_of_a_run(tmp_path, monkeypatch):
    """tqdm is an extra: without it a run on a terminal goes on without a bar."""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert train("toy", "EW", out=tmp_path, progress=True)["state"] == "finished"

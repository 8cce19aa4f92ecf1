"""What a step costs: its parts, its passes, the committed measurement, the figure. No test asserts
a speed."""

import csv
import functools
import importlib.util
import json
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import dbmtl.profile
from dbmtl import make_balancer, method_names
from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.loop import Loop
from dbmtl.profile import (
    Probe,
    StepCost,
    Stopwatch,
    anatomy,
    cost_rounds,
    numbers_kept,
    step_clock,
    step_cost,
)

ROOT = Path(__file__).resolve().parents[2]
METHOD_COST = ROOT / "ci" / "benchmarks" / "method_cost.py"
PLAIN = "sum(losses).backward()"


class Ticks:
    """A clock that goes on by one at each reading."""

    now = 0

    def __call__(self):
        self.now += 1
        return float(self.now)


class Worker(nn.Module):
    """A training loop on a clock of its own: forward takes 2, a pass 7, aggregation 5, the
    optimizer 3 and 1."""

    def __init__(self, method, **options):
        super().__init__()
        self.now = 0.0
        self.position = 0  # in the epoch
        self.steps = 2  # an epoch has
        self.calls = []
        self.model = nn.Module()
        self.model.trunk = nn.Linear(2, 2)
        self.model.heads = nn.ModuleList(nn.Linear(2, 1) for _ in range(3))
        self.balancer = make_balancer(method, shared=self.model.trunk, num_tasks=3, **options)
        learned = list(self.balancer.parameters())
        self.optimizer = torch.optim.SGD([*self.model.parameters(), *learned], 1e-2)
        self.balancer.aggregator.register_forward_pre_hook(lambda *_: self.work(5))
        self.optimizer.register_step_pre_hook(lambda *_: self.work(3))
        self.zero_grad_itself = self.optimizer.zero_grad
        self.optimizer.zero_grad = self.zero

    def work(self, seconds):
        self.now += seconds

    def zero(self):
        self.work(1)
        self.zero_grad_itself()

    def step(self):
        self.work(2)
        z = self.model.trunk(torch.ones(4, 2))
        z.grad_fn.register_prehook(lambda _: self.work(7))
        self.balancer.backward([head(z).square().mean() + 1 for head in self.model.heads])
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.position += 1
        self.calls.append("step")

    def end_epoch(self):
        self.position = 0
        self.calls.append("epoch")


def toy_loop(method, **hyper):
    benchmark = get_benchmark("toy")
    scale = benchmark.scale("smoke")
    data = benchmark.load(scale, "cpu", 0)
    return Loop(benchmark, data, benchmark.tasks, method, 0, scale, hyper=hyper)


def load_script():
    spec = importlib.util.spec_from_file_location("method_cost", METHOD_COST)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# -------------------------------------------------------------------------------------------- parts


@pytest.mark.parametrize(
    "method, passes, aggregated", [("EW", 1, 5), ("DB-MTL", 3, 5), ("CAGrad", 3, 5), ("MoCo", 3, 5)]
)
def test_step_cost_knows_where_the_time_went(method, passes, aggregated):
    worker = Worker(method)
    cost = step_cost(worker, lambda: worker.now)
    assert cost == StepCost(2, 7 * passes, aggregated, 4, passes)


def test_step_cost_adds_up_to_the_whole_step():
    worker = Worker("IMTL")
    start = worker.now
    cost = step_cost(worker, lambda: worker.now)
    assert cost.total == worker.now - start == 2 + 21 + 5 + 4


def test_step_cost_does_not_count_its_own_looking(monkeypatch):
    worker = Worker("DB-MTL")
    reaches = dbmtl.profile._reaches

    def slow(*arguments):
        worker.work(100)
        return reaches(*arguments)

    monkeypatch.setattr(dbmtl.profile, "_reaches", slow)
    assert step_cost(worker, lambda: worker.now).total == 2 + 21 + 5 + 4
    assert worker.now > 300


@given(st.lists(st.sampled_from(["forward", "backward", None, "end"]), max_size=30))
def test_stopwatch_gives_every_second_to_one_part(names):
    watch = Stopwatch(Ticks())
    start = watch.last
    entered = []
    running = [None]  # names of the parts that are open; None is a pause
    paused = 0.0
    for name in names:
        before = watch.last
        if name == "end":
            if not entered:
                continue
            entered.pop().__exit__(None, None, None)
            ended = running.pop()
        else:
            part = watch.part(name)
            part.__enter__()
            entered.append(part)
            ended = running[-1]
            running.append(name)
        if ended is None:
            paused += watch.last - before
    assert sum(watch.spent.values()) == watch.last - start - paused


def test_stopwatch_goes_on_after_an_error():
    watch = Stopwatch(Ticks())
    with pytest.raises(KeyError), watch.part("a"), watch.part("b"):
        raise KeyError
    assert watch.stack == [None] and watch.spent == {"a": 2.0, "b": 1.0}


# ------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("method", method_names())
def test_step_cost_counts_the_passes_of_the_anatomy(method):
    loop = toy_loop(method)
    cost = [step_cost(loop, Ticks()) for _ in range(2)][-1]
    tasks = len(loop.tasks)
    assert cost.passes == anatomy(lambda **options: make_balancer(method, **options), tasks).passes
    # a part that nothing interrupts lasts one tick: slopes and agents at work are not passes of
    # the network
    assert cost.backward == cost.passes + tasks * (loop.balancer.level == "features")
    assert cost.forward > 0
    assert cost.balancing > 0
    assert cost.optimizer > 0


@pytest.mark.parametrize("grads, passes", [("loop", 3), ("split", 3), ("batched", 1)])
def test_step_cost_counts_passes_through_the_trunk_alone(grads, passes):
    cost = step_cost(Worker("DB-MTL", grads=grads), Ticks())
    assert cost.passes == passes
    assert cost.backward == (3 if grads == "loop" else 3 + passes)


def test_step_cost_leaves_everything_as_it_was():
    before = torch.autograd.grad, torch.autograd.backward
    worker = Worker("EW")
    zero_grad = worker.optimizer.zero_grad
    step_cost(worker, Ticks())
    worker.step = lambda: worker.balancer.backward([torch.tensor(torch.nan)] * 3)
    with pytest.raises(ValueError):
        step_cost(worker, Ticks())
    assert (torch.autograd.grad, torch.autograd.backward) == before
    assert worker.optimizer.zero_grad is zero_grad
    assert "backward" not in vars(worker.balancer)
    assert "step" not in vars(worker.optimizer)


def test_step_cost_trains_like_the_loop_alone():
    measured = toy_loop("DB-MTL")  # one after the other: dropout draws from the global generator
    for _ in range(2):
        step_cost(measured)
    alone = toy_loop("DB-MTL")
    for _ in range(2):
        alone.step()
    for p, expected in zip(measured.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(p, expected)


def test_step_clock_waits_for_an_accelerator(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = step_clock("cuda:1")
    assert clock() <= clock()
    assert waited == [torch.device("cuda:1")] * 2


@pytest.mark.parametrize("name", method_names())
def test_a_task_may_be_missing_where_both_parts_say_so(name):
    make = functools.partial(make_balancer, name)
    balancer = make(shared=Probe().trunk, num_tasks=3)
    allowed = balancer.transform.can_skip_tasks and balancer.aggregator.can_skip_tasks
    assert anatomy(make).may_miss == allowed


def test_numbers_kept_are_those_of_the_anatomy():
    shared = nn.Linear(3, 2)
    balancer = make_balancer("DB-MTL", shared=shared, num_tasks=2)
    assert numbers_kept(balancer) == 0
    balancer.backward([shared(torch.ones(3)).square().sum() + 1 for _ in range(2)])
    assert numbers_kept(balancer) == 2 * 8


# ------------------------------------------------------------------------------------------- rounds


def test_cost_rounds_take_turns_and_end_epochs():
    workers = {}
    order = []

    class Ordered(Worker):
        def __init__(self, name):
            super().__init__("EW")
            self.name = name
            workers[name] = self

        def step(self):
            order.append(self.name)
            super().step()

    makers = {name: functools.partial(Ordered, name) for name in "abc"}
    outcomes = cost_rounds(makers, rounds=6, warm_up=2, clock=Ticks())
    rounds = [order[i : i + 3] for i in range(0, 24, 3)]
    assert all(sorted(names) == ["a", "b", "c"] for names in rounds)
    assert len(set(map(tuple, rounds))) > 1
    assert all(len(costs) == 6 for costs in outcomes.values())
    assert workers["a"].calls == ["step", "step", "epoch"] * 4


def test_cost_rounds_record_what_fails():
    class Late(Worker):
        def step(self):
            if len(self.calls) >= 2:
                raise ZeroDivisionError("too late")
            super().step()

    def never():
        raise IndexError("no such thing")

    makers = {"good": lambda: Worker("EW"), "late": lambda: Late("EW"), "never": never}
    outcomes = cost_rounds(makers, 3, clock=Ticks())
    assert len(outcomes["good"]) == 3
    assert outcomes["late"] == "ZeroDivisionError: too late"
    assert outcomes["never"] == "IndexError: no such thing"


def test_cost_rounds_record_an_error_of_a_method():
    def without_a_solution(*_):
        raise RuntimeError("no solution")

    loop = toy_loop("Nash-MTL")
    loop.balancer.aggregator.forward = without_a_solution
    outcomes = cost_rounds({"Nash-MTL": lambda: loop}, 2)
    assert outcomes["Nash-MTL"] == "Ended: failed: RuntimeError: no solution"


# --------------------------------------------------------------------------------------- the record


def test_method_cost_script_measures_and_writes():
    script = load_script()
    methods = [PLAIN, "EW", "UW", "Nonsense"]
    result = script.measure("nyuv2", "smoke", methods, rounds=1, warm_up=0, device="cpu")
    dumped = script.dumped(result)
    assert result == json.loads(dumped)
    assert dumped.count("\n") < 200
    assert set(result["ms"]) == {PLAIN, "EW", "UW"}
    assert set(result["ms"]["EW"]) == set(script.PARTS)
    assert result["passes"] == {PLAIN: 1, "EW": 1, "UW": 1}
    # the optimizer keeps two moments of three numbers and a step
    assert result["counts"]["UW"] == {"learned": 3, "kept": 3, "kept by the optimizer": 7}
    assert "unknown method 'Nonsense'" in result["failed"]["Nonsense"]
    text = script.markdown(result)
    for part in ("| EW | 1 |", "| 1.00 |", "failed: ValueError", "threads: "):
        assert part in text


def test_method_cost_generates_the_samples_of_every_scale():
    script = load_script()
    for scale in get_benchmark("nyuv2").scales.values():
        timed = script.timed_scale(scale)
        assert timed.extra["source"] == "generated"
        assert timed.extra["weights"] == "none"
        assert (timed.width, timed.batch_size) == (scale.width, scale.batch_size)
        assert timed.train_size == 3 * scale.batch_size


RECORD = ROOT / "figures" / "benchmarks" / "method_cost.json"


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_method_cost_record_has_every_method(record):
    measured = set(record["ms"]) | set(record["failed"])
    assert measured <= {PLAIN, *method_names()}
    numbers = ROOT / "figures" / "paper" / "figure7_numbers.csv"
    with open(numbers, newline="", encoding="utf-8") as file:
        table = {row["method"]: row for row in csv.DictReader(file)}
    not_run = {name for name, row in table.items() if "not run" in row.values()}
    assert {PLAIN, *method_names()} - measured == not_run  # a new method says so
    assert not set(record["ms"]) & set(record["failed"])
    assert all(record["failed"].values())
    for costs in record["ms"].values():
        for milliseconds in costs.values():
            assert len(milliseconds) == record["rounds"]
            assert min(milliseconds) >= 0
    assert record["threads"] == 1
    assert record["tasks"] == 3
    assert record["rounds"] >= 9


def test_method_cost_record_agrees_with_the_anatomy(record):
    kept = record["parameters"]["shared"] * 3
    assert record["counts"]["DB-MTL"] == {"learned": 0, "kept": kept, "kept by the optimizer": 0}
    for method, passes in record["passes"].items():
        make = functools.partial(make_balancer, "EW" if method == PLAIN else method)
        assert passes == anatomy(make).passes, method


def test_figure7_csv_agrees_with_the_record(record):
    with (ROOT / "figures" / "paper" / "figure7.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    drawn = {}
    printed = {}
    for row in rows:
        if row["source"] == "ours":
            drawn[row["method"], row["part"]] = float(row["times EW"])
        if row["source"] == "paper":
            printed[row["method"]] = float(row["times EW"])
    medians = {}
    for method, costs in record["ms"].items():
        medians[method] = {part: statistics.median(ms) for part, ms in costs.items()}
    one = sum(medians["EW"].values())
    for method, parts in medians.items():
        for part, value in (parts | {"total": sum(parts.values())}).items():
            assert drawn[method, part] == pytest.approx(value / one, rel=1e-5), (method, part)
    assert len(printed) == 21
    assert printed["EW"] == 1
    assert printed["DB-MTL"] == pytest.approx(245 / 85, rel=1e-5)


def test_method_cost_table_is_that_of_the_record(record):
    assert (RECORD.with_suffix(".md")).read_text(encoding="utf-8") == load_script().markdown(record)


def test_step_cost_is_a_number_for_every_part():
    worker = Worker("UW")
    loop = SimpleNamespace(
        model=worker.model,
        balancer=worker.balancer,
        optimizer=worker.optimizer,
        step=lambda: None,
    )
    assert step_cost(loop, Ticks()) == StepCost(forward=1.0)


def test_the_learning_of_igb_is_timed_for_a_step():
    script = load_script()
    ticks = iter([1.0, 6.0])
    loop = toy_loop("IGBv2")
    every = loop.balancer.transform.timetable.update_every
    assert script.learning_of_igb(loop, lambda: next(ticks)) == round(5000 / every, 3)

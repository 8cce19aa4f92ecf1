"""What a step costs: its parts, its passes, the committed measurement, the figure. No test asserts a speed."""

import csv
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

import dbmtl.profile as anatomy_module
from dbmtl import make_balancer, method_names
from dbmtl.benchmarks.base import get_benchmark
from dbmtl.experiments.train import Loop
from dbmtl.profile import (
    StepCost,
    Stopwatch,
    anatomy,
    cost_rounds,
    numbers_kept,
    step_clock,
    step_cost,
)

ROOT = Path(__file__).resolve().parents[2]
PLAIN = "sum(losses).backward()"


class Ticks:
    """A clock that goes on by one at each reading."""

    now = 0

    def __call__(self):
        self.now += 1
        return float(self.now)


class Worker(nn.Module):
    """A training loop on a clock of its own: forward takes 2, a pass 7, aggregation 5, the optimizer 3 and 1."""

    def __init__(self, method, **options):
        super().__init__()
        self.now, self.position, self.steps, self.calls = 0.0, 0, 2, []
        self.model = nn.Module()
        self.model.trunk, self.model.heads = (
            nn.Linear(2, 2),
            nn.ModuleList(nn.Linear(2, 1) for _ in range(3)),
        )
        self.balancer = make_balancer(method, shared=self.model.trunk, num_tasks=3, **options)
        learned = list(self.balancer.parameters())
        self.optimizer = torch.optim.SGD([*self.model.parameters(), *learned], 1e-2)
        self.balancer.aggregator.register_forward_pre_hook(lambda *_: self.work(5))
        self.optimizer.register_step_pre_hook(lambda *_: self.work(3))
        self.empty, self.optimizer.zero_grad = self.optimizer.zero_grad, self.zero

    def work(self, seconds):
        self.now += seconds

    def zero(self):
        self.work(1)
        self.empty()

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
    return Loop(
        benchmark, benchmark.load(scale, "cpu", 0), benchmark.tasks, method, 0, scale, hyper=hyper
    )


def load_script():
    spec = importlib.util.spec_from_file_location(
        "method_cost", ROOT / "ci" / "benchmarks" / "method_cost.py"
    )
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ------------------------------------------------------------------------------------------------------------ parts


def test_step_cost_knows_where_the_time_went():
    for method, passes, aggregated in (
        ("EW", 1, 5),
        ("DB-MTL", 3, 5),
        ("CAGrad", 3, 5),
        ("MoCo", 3, 5),
    ):
        worker = Worker(method)
        assert step_cost(worker, lambda w=worker: w.now) == StepCost(
            2, 7 * passes, aggregated, 4, passes
        ), method


def test_step_cost_adds_up_to_the_whole_step():
    worker = Worker("IMTL")
    start = worker.now
    cost = step_cost(worker, lambda: worker.now)
    assert cost.total == worker.now - start == 2 + 21 + 5 + 4


def test_step_cost_does_not_count_its_own_looking(monkeypatch):
    worker, looked = Worker("DB-MTL"), anatomy_module._reaches
    monkeypatch.setattr(
        anatomy_module, "_reaches", lambda *given: (worker.work(100), looked(*given))[1]
    )
    assert step_cost(worker, lambda: worker.now).total == 2 + 21 + 5 + 4
    assert worker.now > 300


@given(st.lists(st.sampled_from(["forward", "backward", None, "end"]), max_size=30))
def test_stopwatch_gives_every_second_to_one_part(names):
    clock, watch, entered, paused, start = Ticks(), None, [], 0.0, 0.0
    watch = Stopwatch(clock)
    start, before = watch.last, [None]
    for name in names:
        now = watch.last
        if name == "end":
            if not entered:
                continue
            entered.pop().__exit__(None, None, None)
            paused += (watch.last - now) * (before.pop() is None)
        else:
            part = watch.part(name)
            part.__enter__()
            paused += (watch.last - now) * (before[-1] is None)
            entered.append(part)
            before.append(name)
    assert sum(watch.spent.values()) == watch.last - start - paused


def test_stopwatch_goes_on_after_an_error():
    watch = Stopwatch(Ticks())
    with pytest.raises(KeyError), watch.part("a"), watch.part("b"):
        raise KeyError
    assert watch.stack == [None] and watch.spent == {"a": 2.0, "b": 1.0}


# ----------------------------------------------------------------------------------------------------------- passes


@pytest.mark.parametrize("method", method_names())
def test_step_cost_counts_the_passes_of_the_anatomy(method):
    loop = toy_loop(method)
    cost = [step_cost(loop, Ticks()) for _ in range(2)][-1]
    tasks = len(loop.tasks)
    assert cost.passes == anatomy(lambda **options: make_balancer(method, **options), tasks).passes
    # a part that nothing interrupts lasts one tick: slopes and agents at work are not passes of the network
    assert cost.backward == cost.passes + tasks * (loop.balancer.level == "features")
    assert cost.forward > 0 and cost.balancing > 0 and cost.optimizer > 0


@pytest.mark.parametrize("grads, passes", [("loop", 3), ("split", 3), ("batched", 1)])
def test_step_cost_counts_passes_through_the_trunk_alone(grads, passes):
    cost = step_cost(Worker("DB-MTL", grads=grads), Ticks())
    assert cost.passes == passes
    assert cost.backward == (3 if grads == "loop" else 3 + passes)


def test_step_cost_leaves_everything_as_it_was():
    before, worker = (torch.autograd.grad, torch.autograd.backward), Worker("EW")
    kept = worker.optimizer.zero_grad
    step_cost(worker, Ticks())
    worker.step = lambda: worker.balancer.backward([torch.tensor(torch.nan)] * 3)
    with pytest.raises(ValueError):
        step_cost(worker, Ticks())
    assert (
        torch.autograd.grad,
        torch.autograd.backward,
    ) == before and worker.optimizer.zero_grad is kept
    assert "backward" not in vars(worker.balancer) and "step" not in vars(worker.optimizer)


def test_step_cost_trains_like_the_loop_alone():
    measured = toy_loop("DB-MTL")  # one after the other: dropout draws from the global generator
    for _ in range(2):
        step_cost(measured)
    alone = toy_loop("DB-MTL")
    for _ in range(2):
        alone.step()
    for mine, other in zip(measured.model.parameters(), alone.model.parameters(), strict=True):
        assert torch.equal(mine, other)


def test_step_clock_waits_for_an_accelerator(monkeypatch):
    waited = []
    monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
    clock = step_clock("cuda:1")
    assert clock() <= clock() and waited == [torch.device("cuda:1")] * 2


def test_numbers_kept_are_those_of_the_anatomy():
    shared = nn.Linear(3, 2)
    balancer = make_balancer("DB-MTL", shared=shared, num_tasks=2)
    assert numbers_kept(balancer) == 0
    balancer.backward([shared(torch.ones(3)).square().sum() + 1 for _ in range(2)])
    assert numbers_kept(balancer) == 2 * 8


# ----------------------------------------------------------------------------------------------------------- rounds


def test_cost_rounds_take_turns_and_end_epochs():
    workers, order = {}, []

    def maker(name):
        def make():
            worker = workers[name] = Worker("EW")
            step = worker.step
            worker.step = lambda: (order.append(name), step())
            return worker

        return make

    found = cost_rounds({name: maker(name) for name in "abc"}, rounds=6, warm_up=2, clock=Ticks())
    rounds = [order[i : i + 3] for i in range(0, 24, 3)]
    assert (
        all(sorted(names) == ["a", "b", "c"] for names in rounds)
        and len(set(map(tuple, rounds))) > 1
    )
    assert all(len(costs) == 6 for costs in found.values())
    assert workers["a"].calls == ["step", "step", "epoch"] * 4


def test_cost_rounds_record_what_fails():
    late = Worker("EW")
    step, late.step = late.step, lambda: step() if len(late.calls) < 2 else 1 / 0
    found = cost_rounds(
        {"good": lambda: Worker("EW"), "late": lambda: late, "never": lambda: [][0]},
        3,
        clock=Ticks(),
    )
    assert len(found["good"]) == 3
    assert found["late"] == "ZeroDivisionError: division by zero" and found["never"].startswith(
        "IndexError: "
    )


def test_cost_rounds_record_an_error_of_a_method():
    loop = toy_loop("Nash-MTL")
    loop.balancer.aggregator.forward = lambda *_: (_ for _ in ()).throw(RuntimeError("no solution"))
    assert (
        cost_rounds({"Nash-MTL": lambda: loop}, 2)["Nash-MTL"]
        == "Ended: failed: RuntimeError: no solution"
    )


# ------------------------------------------------------------------------------------------------------- the record


def test_method_cost_script_measures_and_writes():
    script = load_script()
    result = script.measure(
        "nyuv2", "smoke", [PLAIN, "EW", "UW", "Nonsense"], rounds=1, warm_up=0, device="cpu"
    )
    assert result == json.loads(script.dumped(result)) and script.dumped(result).count("\n") < 200
    assert set(result["ms"]) == {PLAIN, "EW", "UW"} and set(result["ms"]["EW"]) == set(script.PARTS)
    assert result["passes"] == {PLAIN: 1, "EW": 1, "UW": 1}
    assert result["counts"]["UW"] == {
        "learned": 3,
        "kept": 3,
        "kept by the optimizer": 7,
    }  # 2 moments and a step
    assert "unknown method 'Nonsense'" in result["failed"]["Nonsense"]
    text = script.markdown(result)
    assert (
        "| EW | 1 |" in text
        and "| 1.00 |" in text
        and "failed: ValueError" in text
        and "threads: " in text
    )


def test_method_cost_generates_the_samples_of_every_scale():
    script = load_script()
    for scale in get_benchmark("nyuv2").scales.values():
        timed = script.timed_scale(scale)
        assert timed.extra["source"] == "generated" and timed.extra["weights"] == "none"
        assert (timed.width, timed.batch_size) == (scale.width, scale.batch_size)
        assert timed.train_size == 2 * scale.batch_size


RECORD = ROOT / "figures" / "benchmarks" / "method_cost.json"


@pytest.fixture(scope="module")
def record():
    return json.loads(RECORD.read_text(encoding="utf-8"))


def test_method_cost_record_has_every_method(record):
    assert set(record["ms"]) | set(record["failed"]) == {PLAIN, *method_names()}
    assert not set(record["ms"]) & set(record["failed"]) and all(record["failed"].values())
    parts = [values for costs in record["ms"].values() for values in costs.values()]
    assert {len(values) for values in parts} == {record["rounds"]} and min(map(min, parts)) >= 0
    assert record["threads"] == 1 and record["tasks"] == 3 and record["rounds"] >= 9


def test_method_cost_record_agrees_with_the_anatomy(record):
    kept = record["parameters"]["shared"] * 3
    assert record["counts"]["DB-MTL"] == {"learned": 0, "kept": kept, "kept by the optimizer": 0}
    for method, passes in record["passes"].items():
        name = "EW" if method == PLAIN else method
        assert (
            passes == anatomy(lambda name=name, **options: make_balancer(name, **options)).passes
        ), method


def test_figure7_csv_agrees_with_the_record(record):
    with (ROOT / "figures" / "figure7_cost.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    drawn = {
        (row["method"], row["part"]): float(row["times EW"])
        for row in rows
        if row["source"] == "ours"
    }
    medians = {
        m: {part: statistics.median(v) for part, v in costs.items()}
        for m, costs in record["ms"].items()
    }
    one = sum(medians["EW"].values())
    for method, parts in medians.items():
        for part, value in (parts | {"total": sum(parts.values())}).items():
            assert drawn[method, part] == pytest.approx(value / one, rel=1e-5), (method, part)
    printed = {row["method"]: float(row["times EW"]) for row in rows if row["source"] == "paper"}
    assert (
        len(printed) == 21
        and printed["EW"] == 1
        and printed["DB-MTL"] == pytest.approx(245 / 85, rel=1e-5)
    )


def test_method_cost_table_is_that_of_the_record(record):
    assert (RECORD.with_suffix(".md")).read_text(encoding="utf-8") == load_script().markdown(record)


def test_step_cost_is_a_number_for_every_part():
    loop = SimpleNamespace(
        **{name: getattr(Worker("UW"), name) for name in ("model", "balancer", "optimizer")}
    )
    loop.step = lambda: None
    assert step_cost(loop, Ticks()) == StepCost(forward=1.0)

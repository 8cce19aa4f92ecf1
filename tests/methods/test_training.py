"""What methods ask of the loop beyond losses: a second look, epochs, three batches, features."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.benchmarks.base import get_benchmark
from dbmtl.benchmarks.toy import toy, toy_multi
from dbmtl.core.aggregator import (
    CrossGramianAggregator,
    GradientAggregator,
    GramianAggregator,
    TensorNormAggregator,
)
from dbmtl.core.balancer import Balancer
from dbmtl.experiments import loop as lab
from dbmtl.experiments.checkpoints import load_checkpoint, save_checkpoint
from dbmtl.experiments.records import configuration, read_records
from dbmtl.experiments.train import Run, resume, train
from dbmtl.gradient_balancing.sum import Sum
from dbmtl.loss_balancing.log import Identity
from dbmtl.registry import method_names
from dbmtl.report.style import method_style, printed_name

pytestmark = pytest.mark.full

FIGURES = Path(__file__).resolve().parents[2] / "figures"


class Look(Identity):
    """Counts its second looks, and keeps what it saw."""

    looks_again = True

    def after_step(self, losses):
        assert not losses.requires_grad
        self.memory["seen"] = [*self.memory.get("seen", []), losses.tolist()]

    def end_epoch(self, means):
        self.memory["means"] = [*self.memory.get("means", []), means.tolist()]


class Cross(CrossGramianAggregator):
    """Plain sum over the third batch; keeps the cross Gramians."""

    def forward(self, C, losses):
        self.memory["C"] = [*self.memory.get("C", []), C]
        return torch.ones_like(losses)


class Finished(GradientAggregator):
    """Writes the sum of all gradients, heads included, as a finished update."""

    moves_alone = True

    def forward(self, rows, losses, where=None):
        return [sum(column) for column in zip(*rows, strict=True)]

    def of_heads(self, heads):
        return {p: sum(row.get(p, 0) for row in heads) for row in heads for p in row}


class PerTensor(TensorNormAggregator):
    """A weight for each tensor."""

    def forward(self, norms, losses, where=None):
        return torch.ones_like(norms)


class OfFeatures(GramianAggregator):
    """The plain sum at feature level."""

    def forward(self, M, losses):
        return torch.ones_like(losses)


@pytest.fixture
def method(monkeypatch):
    """Make the lab train with axes of the test's own, under the name of EW."""

    def use(transform=Identity, aggregator=Sum, level="parameters"):
        def made(name, *, shared, num_tasks, **_):
            return Balancer(
                transform(), aggregator(), shared=shared, num_tasks=num_tasks, level=level
            )

        monkeypatch.setattr(lab, "make_balancer", made)

    return use


def started(benchmark=toy, method="EW", seed=0, hyper=None, **options):
    data = benchmark.load(benchmark.scale("smoke"), "cpu", 0)
    return Run(benchmark, method, seed, "smoke", "cpu", hyper, data, **options)


def weights(run):
    return torch.cat([p.detach().flatten() for p in run.loop.model.parameters()])


def advanced(run, steps):
    for _ in range(steps):
        run.advance()
    return run


# ------------------------------------------------------------------------ a second look, and epochs


@pytest.mark.parametrize("benchmark", [toy, toy_multi], ids=["toy", "toy-multi"])
def test_the_second_look_is_at_the_same_batch_after_the_step_in_train_mode(
    method, benchmark, monkeypatch
):
    plain, calls, modes = lab.task_losses, [], []

    def spy(model, tasks, samples):
        calls.append(samples)
        modes.append((model.training, torch.is_grad_enabled()))
        return plain(model, tasks, samples)

    method(Look)
    monkeypatch.setattr(lab, "task_losses", spy)
    run = advanced(started(replace(benchmark, network=without_dropout(benchmark))), 3)
    assert [a is b for a, b in zip(calls[::2], calls[1::2], strict=True)] == [True] * 3
    assert modes == [(True, True), (True, False)] * 3
    again = plain(run.loop.model, run.loop.tasks, calls[-1])
    assert_close(
        run.loop.balancer.transform.memory["seen"][-1], [x.item() for x in again]
    )  # after the step


def without_dropout(benchmark):
    def network(*args):
        model = benchmark.network(*args)
        model.trunk[2] = nn.Identity()
        return model

    return network


class Noisy:
    """A split whose batches are augmented at random."""

    def __init__(self, split):
        self.split = split

    def __len__(self):
        return len(self.split)

    def batch(self, index):
        inputs, targets = self.split.batch(index)
        return inputs + torch.randn_like(inputs), targets


def test_the_second_look_sees_the_augmented_batch(method):
    method(Look)
    still = replace(
        toy, network=without_dropout(toy), optimizer=lambda p, scale: torch.optim.SGD(p, lr=0.0)
    )
    run = started(still)
    run.data = replace(run.data, train=Noisy(run.data.train))
    run.loop.data = run.data
    first = []
    for _ in range(3):
        run.advance()
        first.append(run.loop.losses.tolist())
    assert_close(
        run.loop.balancer.transform.memory["seen"], first
    )  # nothing moved: the very same losses
    assert len({row[0] for row in first}) == 3


def test_methods_that_do_not_look_again_cost_one_forward(monkeypatch):
    plain, calls = lab.task_losses, []
    monkeypatch.setattr(lab, "task_losses", lambda *args: calls.append(0) or plain(*args))
    advanced(started(), 3)
    assert len(calls) == 3


def test_batch_norm_moves_twice_with_a_second_look(method):
    def network(*args):
        model = toy.network(*args)
        model.trunk[2] = nn.BatchNorm1d(16)
        return model

    plain = advanced(started(replace(toy, network=network)), 2)
    method(Look)
    double = advanced(started(replace(toy, network=network)), 2)
    assert [run.loop.model.trunk[2].num_batches_tracked.item() for run in (plain, double)] == [2, 4]


def test_a_second_look_that_is_not_finite_is_divergence(method, tmp_path):
    method(Look)

    class Wild(torch.optim.SGD):
        def step(self):
            with torch.no_grad():
                for group in self.param_groups:
                    for p in group["params"]:
                        p.fill_(float("nan"))

    wild = replace(
        toy, optimizer=lambda parameters, scale: Wild(parameters, lr=1.0), scheduler=None
    )
    record = train(wild, "EW", out=tmp_path)
    assert (record["state"], record["step"]) == ("diverged", 0)
    assert record["reason"].startswith("the loss of task 'unit' is nan")


def test_epoch_means_reach_the_method(method):
    method(Look)
    run = advanced(started(), 12)
    found = torch.tensor(run.loop.balancer.transform.memory["means"])
    expected = torch.tensor([list(row["train"].values()) for row in run.loop.rows])
    assert found.shape == (2, 3)
    assert_close(found, expected)


def test_an_error_at_the_end_of_an_epoch_is_the_methods(method, tmp_path):
    class Fails(Identity):
        def end_epoch(self, means):
            raise RuntimeError("no base loss")

    method(Fails)
    record = train(toy, "EW", out=tmp_path)
    assert (record["state"], record["reason"], record["step"]) == (
        "failed",
        "RuntimeError: no base loss",
        6,
    )


# ------------------------------------------------------------------------------------ three batches


@pytest.mark.parametrize("benchmark", [toy, toy_multi], ids=["toy", "toy-multi"])
def test_three_independent_orders_the_first_as_for_everybody(method, benchmark):
    plain = started(benchmark)
    method(aggregator=Cross)
    run = started(benchmark)
    assert len(run.loop.orders) == 3 and len(plain.loop.orders) == 1
    for _ in range(2):  # epochs
        for name, batches in plain.loop.orders[0].items():
            flat = [torch.cat(order[name]).tolist() for order in run.loop.orders]
            assert flat[0] == torch.cat(batches).tolist()
            assert flat[0] != flat[1] != flat[2] != flat[0]
            assert benchmark is toy_multi or [sorted(f) for f in flat] == [sorted(flat[0])] * 3
        advanced(run, run.loop.steps)
        advanced(plain, plain.loop.steps)
    other = started(benchmark, seed=1)
    name = next(iter(other.loop.orders[0]))
    assert all(
        torch.cat(other.loop.orders[0][name]).tolist() != torch.cat(o[name]).tolist()
        for o in run.loop.orders
    )


def test_the_balancer_gets_the_three_batches(method):
    """The cross Gramian is that of the first two batches, the step that of the third."""
    method(aggregator=Cross)
    run = started(replace(toy, network=without_dropout(toy)))
    before, model = weights(run).clone(), run.loop.model
    rows, heads = [], []
    for order in run.loop.orders:
        losses = lab.task_losses(model, toy.tasks, lab.draw(run.data.train, {None: order[None][0]}))
        found = [
            torch.autograd.grad(loss, list(model.trunk.parameters()), retain_graph=True)
            for loss in losses
        ]
        rows.append(torch.stack([torch.cat([g.flatten() for g in row]) for row in found]))
        heads.append(losses)
    run.loop.optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    run.loop.step()
    assert_close(
        run.loop.balancer.aggregator.memory["C"][0].float(),
        rows[0] @ rows[1].T,
        rtol=1e-4,
        atol=1e-4,
    )
    size = rows[2].shape[1]
    assert_close((before - weights(run))[:size], 1e-6 * rows[2].sum(0), rtol=1e-3, atol=1e-6)


# ----------------------------------------------------------------------------------------- features


@pytest.mark.parametrize("benchmark", [toy, toy_multi], ids=["toy", "toy-multi"])
def test_the_sum_at_feature_level_is_the_sum(method, benchmark):
    plain = advanced(started(benchmark), 7)
    method(aggregator=OfFeatures, level="features")
    run = advanced(started(benchmark), 7)
    assert_close(weights(run), weights(plain), rtol=1e-4, atol=1e-6)
    assert not run.loop.model.trunk._forward_hooks


def test_a_trunk_that_returns_no_tensor_is_named(method):
    class Pair(nn.Sequential):
        def forward(self, x):
            return super().forward(x), 0

    class Network(type(toy.network(toy.scale("smoke"), None, ["a"]))):
        def __init__(self, width, tasks):
            super().__init__(width, tasks)
            self.trunk = Pair(*self.trunk)

        def forward(self, inputs, task=None):
            shared, _ = self.trunk(inputs)
            return {name: head(shared).squeeze(1) for name, head in self.heads.items()}

    method(aggregator=OfFeatures, level="features")
    run = started(replace(toy, network=lambda scale, data, tasks: Network(16, tasks)))
    with pytest.raises(
        TypeError, match="the trunk returns tuple: a method at feature level needs one tensor"
    ):
        run.advance()
    assert not run.loop.model.trunk._forward_hooks


# -------------------------------------------------------------------------------- another optimizer


def test_finished_updates_get_plain_sgd(method, tmp_path):
    def adam(parameters, scale):
        first, *rest = parameters
        groups = [{"params": [first], "lr": 0.1, "weight_decay": 0.5}, {"params": rest}]
        return torch.optim.Adam(groups, lr=1e-4, weight_decay=0.0)

    benchmark = replace(toy, name="decay", optimizer=adam, network=without_dropout(toy))
    method(aggregator=Finished)
    run = started(benchmark)
    assert (
        type(run.loop.optimizer) is torch.optim.SGD
        and run.loop.scheduler.optimizer is run.loop.optimizer
    )
    assert [g["lr"] for g in run.loop.optimizer.param_groups] == [0.1, 1e-4]
    first, second = list(run.loop.model.parameters())[:2]
    before = first.detach().clone(), second.detach().clone()
    losses = lab.task_losses(
        run.loop.model, toy.tasks, lab.draw(run.data.train, {None: run.loop.orders[0][None][0]})
    )
    g, h = torch.autograd.grad(sum(losses), [first, second])
    run.advance()
    assert_close(first.detach(), before[0] - 0.1 * (g + 0.5 * before[0]), rtol=1e-4, atol=1e-4)
    assert_close(second.detach(), before[1] - 1e-4 * h, rtol=1e-4, atol=1e-6)
    record = train(benchmark, "EW", out=tmp_path)
    assert (
        record["optimizer"] == "SGD"
        and len(record["notes"]) == 1
        and "decoupled" in record["notes"][0]
    )


def test_a_record_names_its_optimizer_and_has_no_notes_else(tmp_path):
    record = train(toy, "EW", out=tmp_path)
    assert record["optimizer"] == "Adam" and record["notes"] == []
    assert "optimizer" not in record["config"] and "notes" not in record["config"]


def test_notes_tell_of_three_batches_and_second_looks(method, tmp_path):
    method(Look, Cross)
    notes = " ".join(train(toy, "EW", out=tmp_path)["notes"])
    assert "three times the samples" in notes and "second forward pass" in notes


# ----------------------------------------------------------------------------------------- monitors


def test_weights_of_single_tensors_are_not_recorded_and_nothing_breaks(method, tmp_path):
    method(aggregator=PerTensor)
    record = train(toy, "EW", out=tmp_path, monitor_every=3)
    assert record["state"] == "finished" and "weights" not in record["monitors"]
    assert set(record["monitors"]["slopes"]) == set(toy.task_names)


# ---------------------------------------------------------------------------- resuming, bit for bit


def resumed(run, path, stops, steps, **options):
    for stop in stops:
        advanced(run, stop - run.step)
        save_checkpoint(path, run.state_dict())
        torch.randn(5)  # the process draws random numbers of its own
        run = started(**options)
        resume(run, load_checkpoint(path))
    return advanced(run, steps - run.step)


def check_resuming(tmp_path, stops, steps, **options):
    torch.manual_seed(0)
    whole = advanced(started(monitor_every=5, **options), steps)
    kept, rows, monitors = weights(whole).clone(), whole.loop.rows, whole.loop.monitors
    torch.manual_seed(1)
    part = resumed(
        started(monitor_every=5, **options),
        tmp_path / "run.pt",
        stops,
        steps,
        monitor_every=5,
        **options,
    )
    assert (
        torch.equal(weights(part), kept)
        and part.loop.rows == rows
        and part.loop.monitors == monitors
    )
    assert torch.equal(part.loop.sums, whole.loop.sums) and kept.isfinite().all()


@pytest.mark.parametrize(
    "axes", [(Look,), (Identity, Cross), (Identity, Finished)], ids=["look", "cross", "finished"]
)
def test_what_a_method_asks_for_survives_a_stop(method, axes, tmp_path):
    method(*axes)
    check_resuming(tmp_path, (2, 6, 9), 13)


SEVEN = replace(toy, name="seven", scales={"smoke": replace(toy.scale("smoke"), epochs=8)})
STATEFUL = {
    "FAMO": {},
    "IGBv2": {},
    "DWA": {},
    "RLW": {},
    "STCH": {},
    "GradNorm": {},
    "MTAdam": {},
    "MoCo": {},
    "SDMGrad": {},
    "MoDo": {},
    "MetaBalance": {},
    "GradVac": {},
    "ExcessMTL": {},
    "Nash-MTL": {"update_every": 5},
    "PCGrad": {},
    "GradDrop": {},
    "GradDrop-features": {},
    "UW": {},
}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_stopped_run_of_a_stateful_method_ends_the_same(name, tmp_path):
    """Three stops, one between two epochs, the last after the longest warm-up (five epochs)."""
    check_resuming(tmp_path, (3, 12, 40), 46, benchmark=SEVEN, method=name, hyper=STATEFUL[name])


# -------------------------------------------------------------------------------------- all methods


@pytest.mark.parametrize("benchmark", ["toy", "toy-multi"])
@pytest.mark.parametrize("name", method_names())
def test_every_method_trains_on_the_toys(name, benchmark):
    run = started(get_benchmark(benchmark), name)
    before = weights(run).clone()
    advanced(run, 7)  # into the second epoch
    assert weights(run).isfinite().all() and (weights(run) != before).any()


@pytest.mark.parametrize("name", method_names())
def test_every_method_has_a_style(name):
    assert method_style(name) == method_style(printed_name(name))


def test_committed_runs_keep_their_identities():
    """Those of today's protocol; `read_records` compares identity and content."""
    records = read_records(FIGURES / "runs")
    configs = [record["config"] for record in records]
    of_today = [c for c in configs if c["protocol"] == get_benchmark(c["benchmark"]).protocol]
    assert len(of_today) >= 15
    for config in of_today:
        now = configuration(
            config["benchmark"],
            config["method"],
            config["seed"],
            config["scale"]["name"],
            config["hyper"],
        )
        assert json.dumps(now, sort_keys=True) == json.dumps(config, sort_keys=True)


def test_igbv2_hears_of_a_falling_learning_rate():
    scale = toy.scale("smoke")
    loop = lab.Loop(toy, toy.load(scale, "cpu", 0), toy.tasks, "IGBv2", 0, scale)
    assert loop.balancer.transform.lr_ratio == pytest.approx(1)
    loop.optimizer.param_groups[0]["lr"] = scale.learning_rate / 4
    loop._start_epoch()
    assert loop.balancer.transform.lr_ratio == pytest.approx(4)


# ---------------------------------------------------------------------------- loss scaling for fp16


def scaled(benchmark=toy):
    smoke = benchmark.scale("smoke")
    return replace(
        benchmark, scales={"smoke": replace(smoke, extra={**smoke.extra, "precision": "fp16"})}
    )


@pytest.mark.parametrize("name", ["EW", "DB-MTL", "IMTL-L", "CAGrad"])
@pytest.mark.parametrize("benchmark", [toy, toy_multi], ids=["toy", "toy-multi"])
def test_a_power_of_two_as_loss_scale_changes_nothing(benchmark, name):
    plain = advanced(started(benchmark, name), 8)
    run = advanced(started(scaled(benchmark), name), 8)
    assert plain.loop.scaler is None and run.loop.scaler.get_scale() == 65536.0
    assert_close(weights(run), weights(plain), rtol=1e-5, atol=1e-6)


def test_the_loss_scale_is_in_the_checkpoint():
    run = advanced(started(scaled()), 2)
    run.loop.scaler.update(1024.0)
    other = started(scaled())
    resume(other, copy.deepcopy(run.state_dict()))
    assert other.loop.scaler.get_scale() == 1024.0
    state = torch.get_rng_state()
    there = weights(advanced(other, 3))
    torch.set_rng_state(state)  # of dropout
    assert_close(there, weights(advanced(run, 3)), rtol=0, atol=0)


def test_a_step_that_overflows_is_left_out_and_the_scale_halved():
    run = advanced(started(scaled()), 2)
    before, steps = weights(run), run.loop.steps
    hook = next(run.loop.model.trunk.parameters()).register_hook(lambda g: g * float("inf"))
    advanced(run, 1)
    hook.remove()
    assert_close(weights(run), before, rtol=0, atol=0)
    assert run.loop.scaler.get_scale() == 32768.0 and run.loop.position == 3 and steps > 3
    advanced(run, 1)
    assert not torch.equal(weights(run), before)

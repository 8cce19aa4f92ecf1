"""The training loop: one route for all methods."""

import io
from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dbmtl.benchmarks.toy import toy, toy_multi
from dbmtl.core.task_gradients import task_gradients
from dbmtl.experiments import loop as lab
from dbmtl.experiments.train import Run, train


def test_multi_input_epochs_are_as_long_as_the_longest_task_needs():
    data = toy_multi.load(toy_multi.scale("smoke"))  # 90, 54 and 27 samples
    run = Run(toy_multi, "EW", 0, "smoke", "cpu", None, data)
    assert run.steps == 3 * max(90 // 16, 54 // 16, 27 // 16)
    assert {name: len(batches) for name, batches in run.loop.orders[0].items()} == dict.fromkeys(
        run.loop.names, 5
    )
    stl = Run(toy_multi, "STL", 0, "smoke", "cpu", None, data)
    assert stl.steps == 3 * run.steps  # three networks, each with the steps of a multi-task run


@pytest.mark.parametrize("number", [0, 1, 2])
def test_a_single_task_network_sees_the_batches_of_the_multi_task_network(number):
    data = toy_multi.load(toy_multi.scale("smoke"))
    run = Run(toy_multi, "EW", 4, "smoke", "cpu", None, data)
    alone = Run(toy_multi, "STL", 4, "smoke", "cpu", None, data)
    if number:
        alone.start_network(number)
    name = toy_multi.task_names[number]
    for _ in range(2):  # epochs
        assert list(alone.loop.orders[0]) == [name]
        pairs = zip(alone.loop.orders[0][name], run.loop.orders[0][name], strict=True)
        assert all(torch.equal(one, other) for one, other in pairs)
        for loop in (alone.loop, run.loop):
            while loop.position < loop.steps:
                loop.step()
            loop.end_epoch()


def test_a_small_domain_is_seen_again_and_again_in_an_epoch_of_stl():
    data = toy_multi.load(toy_multi.scale("smoke"))
    run = Run(toy_multi, "STL", 0, "smoke", "cpu", None, data)
    run.start_network(2)  # 27 samples: one batch of 16 a pass, five passes an epoch
    batches = run.loop.orders[0]["small"]
    assert [len(batch) for batch in batches] == [16] * 5
    assert all(len(set(batch.tolist())) == 16 for batch in batches)
    assert len({tuple(batch.tolist()) for batch in batches}) == 5


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


def test_a_long_epoch_is_not_taken_for_a_forgotten_one():
    """Elsewhere a method that waits for epochs warns when 200 steps have passed without one."""
    scale = replace(toy.scale("smoke"), train_size=250, batch_size=1)
    loop = lab.Loop(toy, toy.load(scale), toy.tasks, "DWA", 0, scale)
    assert loop.steps == 250
    assert loop.balancer.transform.means.patience >= loop.steps


def test_three_batches_of_a_step_are_drawn_independently():
    data = toy.load(toy.scale("smoke"))
    loop = Run(toy, "SDMGrad", 0, "smoke", "cpu", None, data).loop
    first, second, third = (torch.cat(order[None]).tolist() for order in loop.orders)
    assert sorted(first) == sorted(second) == sorted(third)
    assert first != second != third != first
    alone = Run(toy, "EW", 0, "smoke", "cpu", None, data).loop
    assert torch.cat(alone.orders[0][None]).tolist() == first


def test_a_loop_goes_on_within_an_epoch_with_the_batches_that_it_had():
    data = toy.load(toy.scale("smoke"))
    loop = Run(toy, "EW", 0, "smoke", "cpu", None, data).loop
    for _ in range(2):
        loop.step()
    other = Run(toy, "EW", 1, "smoke", "cpu", None, data).loop
    lab.load_loop_state(other, lab.loop_state(loop))
    assert other.position == 2
    assert_close(other.orders, loop.orders)


def test_equal_weighting_is_plain_training(tmp_path):
    """The loop against ten lines of PyTorch that do the same."""
    scale = toy.scale("smoke")
    data = toy.load(scale)
    record = train(toy, "EW", seed=5, out=tmp_path, data=data)
    torch.manual_seed(5)
    model = toy.network(scale, data, toy.task_names)
    optimizer = toy.optimizer(model.parameters(), scale)
    order = torch.Generator().manual_seed(5)
    means = []
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


def leaves(value, place=()):
    """{place: number or numbers} of nested dictionaries and lists, in which NaN equals NaN."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {place: str(value.tolist() if torch.is_tensor(value) else value)}
    return {
        name: leaf for key, entry in items for name, leaf in leaves(entry, (*place, key)).items()
    }


@pytest.mark.parametrize("method", ["DB-MTL", "UW", "MTAdam"])
def test_a_loaded_state_stays_as_it_was(method):
    """Two loops may go on from one state: neither changes it, nor the other."""
    scale = toy.scale("smoke")
    data = toy.load(scale)
    loop = lab.Loop(toy, data, toy.tasks, method, 0, scale)
    for _ in range(loop.steps):
        loop.step()
    loop.end_epoch()
    loop.step(monitor=True)
    buffer = io.BytesIO()
    torch.save(lab.loop_state(loop), buffer)
    stored = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    untouched = torch.load(io.BytesIO(buffer.getvalue()), weights_only=True)
    weights = []
    for _ in range(2):
        again = lab.Loop(toy, data, toy.tasks, method, 1, scale)
        lab.load_loop_state(again, stored)
        torch.manual_seed(3)
        for _ in range(loop.steps - 1):
            again.step(monitor=True)
        again.end_epoch()
        again.step()
        weights.append([value.clone() for value in again.model.state_dict().values()])
        assert leaves(stored) == leaves(untouched)
    assert all(map(torch.equal, *weights))


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


def test_a_learning_rate_may_fall_to_zero(monkeypatch):
    """As in the last epoch of a cosine schedule: then there is no ratio to be told."""
    scale = toy.scale("smoke")
    loop = lab.Loop(toy, toy.load(scale), toy.tasks, "EW", 0, scale)
    told = []
    monkeypatch.setattr(loop.balancer.transform, "set_learning_rate_ratio", told.append)
    for rate in (scale.learning_rate / 2, 0.0):
        loop.optimizer.param_groups[0]["lr"] = rate
        loop._start_epoch()
    assert told == [2.0]


@pytest.mark.parametrize(("asked", "size"), [(0, 16), (5, 5)])
def test_evaluation_has_a_batch_size_of_its_own(asked, size, monkeypatch):
    scale = replace(toy.scale("smoke"), eval_batch_size=asked)
    loop = lab.Loop(toy, toy.load(scale), toy.tasks, "EW", 0, scale)
    sizes = []
    plain = lab.evaluate

    def evaluate(model, tasks, split, batch_size):
        sizes.append(batch_size)
        return plain(model, tasks, split, batch_size)

    monkeypatch.setattr(lab, "evaluate", evaluate)
    loop.end_epoch()
    assert scale.batch_size == 16 and sizes == [size, size]  # validation and test


def test_a_metric_that_is_not_finite_is_divergence(tmp_path, monkeypatch):
    monkeypatch.setattr(
        lab, "evaluate", lambda *_: {n: {"MAE": float("nan")} for n in toy.task_names}
    )
    record = train(toy, "EW", out=tmp_path)
    assert (
        record["state"] == "diverged"
        and "unit MAE is nan at the end of epoch 1" in record["reason"]
    )

"""Batches, evaluation and features."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from dbmtl.benchmarks.toy import toy
from dbmtl.experiments.step import (
    draw_share,
    epoch_batches,
    epoch_steps,
    evaluate,
    plain_sgd,
    trunk_features,
)


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


def test_short_tasks_leave_out_the_rest_of_each_permutation():
    batches = epoch_batches(10, 4, torch.Generator().manual_seed(0), steps=5, drop_last=True)
    assert [len(batch) for batch in batches] == [4] * 5


def test_an_epoch_has_the_steps_that_its_longest_task_needs():
    tasks = [SimpleNamespace(name=name) for name in "abc"]
    assert epoch_steps({"a": range(54), "b": range(90), "c": range(7)}, tasks, 16) == 5
    assert epoch_steps({"a": range(3), "b": range(5), "c": range(7)}, tasks, 16) == 1
    assert epoch_steps(range(50), tasks, 8) == 7
    assert epoch_steps(range(50), tasks, 8, drop_last=True) == 6
    assert epoch_steps(range(5), tasks, 8, drop_last=True) == 1


def test_plain_sgd_keeps_the_rates_and_the_decay_of_each_group():
    a, b = (nn.Parameter(torch.ones(1)) for _ in range(2))
    groups = [{"params": [a], "weight_decay": 0.1}, {"params": [b], "lr": 0.5}]
    optimizer = plain_sgd(torch.optim.Adam(groups, lr=0.01))
    assert type(optimizer) is torch.optim.SGD
    for group, parameter, rate, decay in zip(
        optimizer.param_groups, (a, b), (0.01, 0.5), (0.1, 0.0), strict=True
    ):
        assert group["params"] == [parameter]
        assert (group["lr"], group["weight_decay"], group["momentum"]) == (rate, decay, 0)


class Labels:
    """Four samples, of which the first two have a label."""

    def batch(self, index):
        return index, {"depth": torch.tensor([1, 1, 0, 0])[index]}


@pytest.mark.parametrize(
    "rank, size, drawn, count",
    [
        (0, 2, [0, 1], 2.0),
        (1, 2, [2, 3], 1e-9),  # a loss of zero, which counts where no rank has a label
        (4, 5, [0], 0.0),  # a sample for the forward pass, because there is none left
    ],
)
def test_what_a_rank_draws_and_counts(rank, size, drawn, count):
    task = SimpleNamespace(name="depth", count=torch.sum)
    samples, counts = draw_share(Labels(), [task], {None: torch.arange(4)}, rank, size)
    assert samples[None][0].tolist() == drawn
    assert counts == [count]


def test_a_task_smaller_than_a_batch_gives_all_it_has():
    assert [
        len(b)
        for b in epoch_batches(3, 8, torch.Generator().manual_seed(0), steps=2, drop_last=True)
    ] == [3, 3]


def test_evaluation_is_in_evaluation_mode_and_leaves_training_mode():
    data = toy.load(toy.scale("smoke"))
    model = toy.network(toy.scale("smoke"), data, toy.task_names).train()
    one = evaluate(model, toy.tasks, data.test, 16)
    two = evaluate(model, toy.tasks, data.test, 16)
    assert one == two and model.training and model.trunk.training


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_evaluation_restores_the_mode_of_every_module(mode, fails):
    """Batch normalization in a frozen part stays in evaluation mode, and dropout stays on."""
    data = toy.load(toy.scale("smoke"))
    model = toy.network(toy.scale("smoke"), data, toy.task_names).train(mode)
    model.trunk.train(not mode)
    before = [module.training for module in model.modules()]
    seen = []
    hook = model.trunk.register_forward_hook(
        lambda *_: seen.extend(module.training for module in model.modules())
    )
    if fails:
        model.trunk.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(model, toy.tasks, data.test, 16)
    else:
        evaluate(model, toy.tasks, data.test, 16)
    hook.remove()
    assert [module.training for module in model.modules()] == before
    assert seen and not any(seen)


def test_a_trunk_that_is_called_twice_is_named():
    trunk = nn.Linear(1, 1)
    model = nn.Module()
    model.trunk = trunk
    with pytest.raises(TypeError, match="called 2 times: .* needs 1"), trunk_features(model, [0]):
        trunk(trunk(torch.ones(1)))
    assert not trunk._forward_hooks


def test_a_trunk_of_several_inputs_is_called_once_a_task():
    model = nn.Module()
    model.trunk = nn.Linear(1, 1)
    with trunk_features(model, ["a", "b"], multi_input=True) as features:
        outputs = [model.trunk(torch.full((1, 1), float(n))) for n in range(2)]
    assert features == outputs
    with pytest.raises(TypeError, match="called 1 times: .* needs 2"):
        with trunk_features(model, ["a", "b"], multi_input=True):
            model.trunk(torch.ones(1, 1))

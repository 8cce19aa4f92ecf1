"""Batches, evaluation and features."""

import pytest
import torch
from torch import nn

from dbmtl.benchmarks.toy import toy
from dbmtl.experiments.step import epoch_batches, evaluate, trunk_features


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

"""Task gradients shortened by their noise, from the moments of the average."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.dbmtl import DBMTL
from dbmtl.gradient_balancing.max_norm import MaxNorm, signal_ratio


def step(balancer, trunk, gradients):
    "One step in which task t has this gradient of the trunk's weight, and a loss of one."
    losses = [
        1 + (trunk.weight * gradient).sum() - (trunk.weight * gradient).sum().detach()
        for gradient in gradients
    ]
    trunk.weight.grad = None
    balancer.backward(losses)
    return trunk.weight.grad.clone()


def reference(history, beta, power):
    "The direction after these gradients, [K][T] of [d], written as the notebook derives it."
    K = len(history)
    weights = [(1 - beta) * beta ** (K - 1 - k) for k in range(K)]
    averages = [
        sum(w * g[t] for w, g in zip(weights, history, strict=True)) for t in range(len(history[0]))
    ]
    lengths = torch.stack([average.norm() for average in averages])
    rho = []
    for t, average in enumerate(averages):
        mean = average / sum(weights)
        square = sum(w * g[t].square().sum() for w, g in zip(weights, history, strict=True)) / sum(
            weights
        )
        rho.append(mean.norm() / square.sqrt())
    return sum(
        lengths.max() * r**power * average / length
        for r, average, length in zip(rho, averages, lengths, strict=True)
    )


@pytest.mark.parametrize("power", [0.0, 1.0, 2.0])
def test_the_direction_of_a_few_steps_by_hand(power):
    torch.manual_seed(0)
    trunk = nn.Linear(3, 2, bias=False).double()
    balancer = DBMTL(shared=trunk, num_tasks=2, beta=0.7, beta_decay=0, eps=0.0, shrinkage=power)
    history = []
    for _ in range(4):
        gradients = [torch.randn(2, 3, dtype=torch.float64) for _ in range(2)]
        history.append(gradients)
        direction = step(balancer, trunk, gradients)
        assert_close(direction, reference(history, 0.7, power))


def test_without_an_average_nothing_is_shrunk():
    gradients = [torch.ones(2, 3), torch.full((2, 3), -2.0)]
    directions = []
    for shrinkage in (0.0, 2.0):
        trunk = nn.Linear(3, 2, bias=False)
        balancer = DBMTL(shared=trunk, num_tasks=2, beta=0.0, shrinkage=shrinkage)
        directions += [step(balancer, trunk, gradients) for _ in range(2)]
    assert all(torch.equal(direction, directions[0]) for direction in directions)


def test_a_state_goes_on_where_it_was():
    torch.manual_seed(0)
    gradients = [[torch.randn(2, 3) for _ in range(2)] for _ in range(4)]
    trunk = nn.Linear(3, 2, bias=False)
    options = {"num_tasks": 2, "beta": 0.9, "beta_decay": 0, "shrinkage": 1.0}
    balancer = DBMTL(shared=trunk, **options)
    for pair in gradients[:2]:
        step(balancer, trunk, pair)
    again = DBMTL(shared=trunk, **options)
    again.load_state_dict(balancer.state_dict())
    for pair in gradients[2:]:
        assert torch.equal(step(balancer, trunk, pair), step(again, trunk, pair))


def test_a_gradient_that_is_not_finite_leaves_the_moments():
    layer = MaxNorm(shrinkage=1.0)
    layer(torch.ones(2), None, torch.ones(2), 0.9)
    before = {name: value.clone() for name, value in layer.memory.items()}
    layer(torch.ones(2), None, torch.tensor([2.0, float("inf")]), 0.9)
    after = layer.memory
    assert after["square"][0] > before["square"][0] and after["square"][1] == before["square"][1]
    assert after["mass"][1] == before["mass"][1]


def test_a_missing_task_keeps_its_moments():
    trunk = nn.Linear(3, 2, bias=False)
    balancer = DBMTL(shared=trunk, num_tasks=2, beta=0.9, beta_decay=0, shrinkage=1.0)
    step(balancer, trunk, [torch.ones(2, 3), 2 * torch.ones(2, 3)])
    before = balancer.aggregator.memory["mass"].clone()
    balancer.backward([(trunk.weight * 1.0).sum().exp(), None])
    after = balancer.aggregator.memory["mass"]
    assert after[0] > before[0] and after[1] == before[1]


def test_a_state_can_be_loaded_before_every_task_was_seen():
    trunk = nn.Linear(3, 2, bias=False)
    options = {"num_tasks": 3, "beta": 0.9, "beta_decay": 0, "shrinkage": 1.0}
    balancer = DBMTL(shared=trunk, **options)
    losses = [(trunk.weight * factor).sum().exp() for factor in (1.0, 2.0)]
    balancer.backward([*losses, None])
    assert balancer.aggregator.memory["mass"].shape == (3,)
    again = DBMTL(shared=trunk, **options)
    again.load_state_dict(balancer.state_dict())
    assert_close(again.aggregator.memory, balancer.aggregator.memory)


def test_rho_lies_between_zero_and_one():
    lengths = torch.tensor([0.0, 1.0, 1.0 + 1e-6])
    assert_close(signal_ratio(lengths, torch.ones(3)), torch.tensor([0.0, 1.0, 1.0]))
    with pytest.raises(ValueError, match="shrinkage"):
        MaxNorm(shrinkage=-1)

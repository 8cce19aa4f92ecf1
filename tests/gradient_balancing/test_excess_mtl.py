"""ExcessMTL: its formula written a second time, steps by hand, parameters that come and go."""

import math

import numpy
import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.gradient_balancing.excess_mtl import ExcessMTL, excess_risk
from dbmtl.loss_balancing.log import Identity

BAD = [
    ("step_size", -1.0),
    ("step_size", math.inf),
    ("warmup", 0),
    ("warmup", 1.5),
    ("warmup", math.inf),
    ("eps", 0.0),
    ("eps", math.inf),
]


def excess_by_formula(G, step_size):
    """The method step by step, with squares and normalized weights, in NumPy."""
    T = G.shape[1]
    squares = numpy.zeros(G.shape[1:])
    w = numpy.ones(T)
    first = None
    for new in G:
        squares += new**2
        excess = (new**2 / numpy.sqrt(squares + 1e-7)).sum(1)
        if first is None:
            first = excess
        else:
            w = w * numpy.exp(step_size * excess / first)
            w = w / w.sum() * T
    return w


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("step_size", [0.01, 1.0])
def test_excess_weights_are_their_formula(T, step_size, jacobians, task_rows):
    G = jacobians(T)[:, 0]
    method = ExcessMTL(step_size)
    for J in G:
        w = method(task_rows(J, 5), torch.ones(T).double(), [0, 1])
    assert_close(w, torch.tensor(excess_by_formula(G.numpy(), step_size)), rtol=1e-10, atol=0)


def test_excess_first_step_is_equal_and_the_second_by_hand():
    method = ExcessMTL(step_size=2.0)
    w = method([[torch.tensor([1.0])], [torch.tensor([1e3])]], torch.ones(2))
    assert_close(w, torch.ones(2))
    w = method([[torch.tensor([1.0])], [torch.tensor([2e3])]], torch.ones(2))
    expected = 2 * torch.tensor([2 / math.sqrt(2), 2 * 4 / math.sqrt(5)]).softmax(0)
    assert_close(w, expected, rtol=1e-5, atol=0)


def test_excess_warmup_takes_the_mean_as_unit():
    G = torch.tensor([[1.0, 2.0], [3.0, 2.0], [0.5, 4.0], [1.0, 1.0]]).double()
    method = ExcessMTL(step_size=1.0, warmup=3)
    w = [method([[g[:1]], [g[1:]]], torch.ones(2).double()) for g in G]
    e = [G[k] ** 2 / (G[: k + 1] ** 2).sum(0).add(1e-7).sqrt() for k in range(4)]
    assert_close(w[:3], [torch.ones(2).double()] * 3)
    assert_close(w[3], 2 * (3 * e[3] / (e[0] + e[1] + e[2])).softmax(0))


def test_excess_of_a_task_that_starts_without_gradient():
    method = ExcessMTL(step_size=1.0)
    zero = torch.zeros(2)
    one = torch.ones(2)
    assert_close(method([[one], [zero]], one), torch.ones(2))
    # task 2 counts as 1 up to its first gradient
    assert_close(method([[zero], [one]], one), 2 * torch.tensor([1.0, 2.0]).softmax(0))
    expected = 2 * torch.tensor([1 + 0.5**0.5, 2 + 0.5**0.5]).softmax(0)
    assert_close(method([[one], [one]], one), expected, atol=1e-6, rtol=0)


def test_excess_of_parameters_that_come_and_go():
    method = ExcessMTL(step_size=1.0)
    whole = ExcessMTL(step_size=1.0)
    a = torch.tensor([2.0])
    b = torch.tensor([-3.0])
    zero = torch.zeros(1)
    for row, positions in (([a], [4]), ([a, b], [4, 2]), ([b], [2])):
        w = method([row, [2 * g for g in row]], torch.ones(2), positions)
    for row in ([a, zero], [a, b], [zero, b]):
        expected = whole([row, [2 * g for g in row]], torch.ones(2), [4, 2])
    assert torch.equal(w, expected)
    assert_close(method.memory["roots"][2], torch.tensor([[3.0], [6.0]]) * 2**0.5)


def test_excess_does_not_overflow():
    huge = torch.tensor([1e30, -1e30])
    assert_close(excess_risk(torch.zeros(1, 2), [huge]).float(), torch.tensor([2e30]))
    method = ExcessMTL(step_size=1.0)
    for g in (1e-25, 1e30, 1.0, 1e30):
        w = method(
            [[torch.tensor([g])], [torch.tensor([1.0])], [torch.tensor([0.0])]], torch.ones(3)
        )
    assert w.isfinite().all() and abs(w.sum().item() - 3) < 1e-5


@pytest.mark.parametrize("weights_heads", [True, False])
def test_excess_weights_reach_the_heads(weights_heads, network, losses_of):
    net = network()
    method = ExcessMTL(1.0, weights_heads=weights_heads)
    balancer = Balancer(Identity(), method, shared=net["trunk"], num_tasks=2)
    for seed in (1, 2):
        net.zero_grad()
        balancer.backward(losses_of(net, seed))
    weights = balancer.weights
    plain = network()
    assert abs(weights[0] - 1) > 0.01
    (losses_of(plain, 2)[1] * (weights[1] if weights_heads else 1)).backward()
    assert_close(net["b"].weight.grad, plain["b"].weight.grad)


@pytest.mark.parametrize("name, value", BAD)
def test_excess_names_a_bad_value(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        ExcessMTL(**{name: value})
    assert str(value) in str(caught.value)

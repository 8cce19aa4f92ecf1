"""MetaBalance: its formula in NumPy, norms by position, zeros, heads, options."""

import math

import numpy
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.gradient_balancing.metabalance import MetaBalance, anchored_weights
from dbmtl.loss_balancing.log import Identity

nan = math.nan


@pytest.mark.parametrize("keys", [{}, {"r": 0.3, "beta": 0.5, "target": 2}, {"r": 1.0}, {"r": 0.0}])
def test_metabalance_is_its_formula(keys, float64, draw):
    method = MetaBalance(**keys)
    r = method.r
    beta = method.beta
    a = method.target
    n = numpy.zeros((3, 4))
    for step in draw(6, 3, 4).abs():
        n = beta * n + (1 - beta) * step.numpy()
        expected = [[r * n[a][p] / n[t][p] + 1 - r for p in range(4)] for t in range(3)]
        assert_close(method(step, None, [0, 1, 2, 3]), float64(*expected))


def test_metabalance_keeps_norms_by_position(draw):
    whole = MetaBalance()
    parts = MetaBalance()
    for k, step in enumerate(draw(4, 2, 3).abs()):
        if k % 2:
            found = whole(step[:, [2, 0]], None, [2, 0])
            assert_close(found[:, 1:], parts(step[:, :1], None, [0]))
        else:
            assert_close(whole(step[:, :2], None, [0, 1])[:, :1], parts(step[:, :1], None, [0]))
    assert whole(torch.zeros(2, 0), None, []).shape == (2, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metabalance_zeros_are_finite(dtype, float64):
    method = MetaBalance()
    weights = method(torch.tensor([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]], dtype=dtype), None, [0, 1, 2])
    assert weights.dtype == dtype
    assert_close(weights, torch.tensor([[0.3, 1.0, 0.3], [0.3, 0.3, 0.3]], dtype=dtype))
    assert_close(anchored_weights(float64([1e10], [1e-10])), float64([1.0], [0.7e20 + 0.3]))


def test_metabalance_permutes_with_its_anchor(draw):
    order = [2, 0, 1]
    plain = MetaBalance(target=2)
    permuted = MetaBalance(target=0)
    for step in draw(4, 3, 2).abs():
        assert_close(permuted(step[order], None, [0, 1]), plain(step, None, [0, 1])[order])


def test_metabalance_multiplies_tensors_and_leaves_heads():
    torch.manual_seed(0)
    trunk = nn.Linear(3, 4)
    heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    x = torch.randn(8, 3)
    losses = [c * h(trunk(x)).square().mean() for c, h in zip((1, 50), heads, strict=True)]
    inputs = [[*trunk.parameters(), h.bias] for h in heads]
    single = [
        torch.autograd.grad(*pair, retain_graph=True) for pair in zip(losses, inputs, strict=True)
    ]
    Balancer(Identity(), MetaBalance(), shared=trunk, num_tasks=2).backward(losses)
    for p, parameter in enumerate(trunk.parameters()):
        a = single[0][p]
        b = single[1][p]
        assert_close(parameter.grad, a + b * (0.7 * a.norm() / b.norm() + 0.3))
    assert_close([h.bias.grad for h in heads], [row[2] for row in single])


@pytest.mark.parametrize(
    "keys, named",
    [
        ({"r": 1.5}, "r must be .*1.5"),
        ({"r": nan}, "r must"),
        ({"beta": 1.0}, "beta"),
        ({"target": -1}, "target"),
        ({"target": 0.0}, "target"),
    ],
)
def test_metabalance_options(keys, named):
    with pytest.raises(ValueError, match=named):
        MetaBalance(**keys)


def test_metabalance_target_through_the_balancer():
    theta = nn.Parameter(torch.ones(2))
    balancer = Balancer(Identity(), MetaBalance(target=2), shared=[theta], num_tasks=2)
    with pytest.raises(ValueError, match="target is task 2 of 2"):
        balancer.backward(list(theta))
    assert theta.grad is None and balancer.step == 0 and balancer.aggregator.memory == {}


def test_metabalance_target_is_one_of_the_tasks():
    method = MetaBalance(target=2)
    with pytest.raises(ValueError, match="target is task 2 of 2"):
        method(torch.ones(2, 1), None, [0])
    assert method.memory == {}


@pytest.mark.full
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_metabalance_norms_that_have_faded_away_multiply_a_zero_gradient(dtype):
    """0.9^8000 is below the smallest float64: ratios overflow, 0 x infinity would be NaN."""
    method = MetaBalance()
    one = torch.ones(1, dtype=dtype)
    zero = torch.zeros(1, dtype=dtype)
    for k in range(8000):
        late = one if k == 0 else zero
        assert method(torch.stack([one, late]), None, [0]).isfinite().all()


@pytest.mark.parametrize("method", [MetaBalance(r=0.2, beta=0.1, target=1)], ids=repr)
def test_repr_evaluates(method):
    assert repr(eval(repr(method))) == repr(method)

"""Nash-MTL: closed form, the largest product of gains by Clarabel, scales, memory, the step."""

import math

import cvxpy
import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.nash_mtl import NashMTL
from dbmtl.loss_balancing.log import Identity, Log


def test_nash_of_two_tasks_in_closed_form(float64, draw):
    assert_close(NashMTL()(torch.diag(float64(9.0, 0.25)), None), float64(1 / 3, 2.0))
    for seed in range(5):
        G = draw(2, 4, seed=seed)
        cosine = torch.nn.functional.cosine_similarity(*G, dim=0)
        assert_close(NashMTL()(G @ G.T, None), 1 / (G.norm(dim=1) * (1 + cosine).sqrt()))


@pytest.mark.parametrize("tasks", [2, 5, 11, 40])
def test_nash_solves_its_equation_blind_to_scale(tasks, draw):
    G = draw(tasks, 2 * tasks, seed=tasks)
    a = NashMTL()(G @ G.T, None)
    assert_close(a * (G @ G.T @ a), torch.ones_like(a), rtol=1e-9, atol=0)
    assert_close((a @ G).norm().item(), math.sqrt(tasks))
    s = torch.logspace(-5, 5, tasks, dtype=torch.float64)
    assert_close(NashMTL()(G @ G.T * s * s[:, None], None) * s, a, rtol=1e-8, atol=0)


def test_nash_is_the_largest_product_of_gains(draw, clarabel):
    G = draw(4, 6)
    x = cvxpy.Variable(6)
    product = cvxpy.sum(cvxpy.log(G.numpy() @ x))
    clarabel(cvxpy.Problem(cvxpy.Maximize(product), [cvxpy.norm(x) <= 2.0]))
    d = NashMTL()(G @ G.T, None) @ G
    assert_close(d, torch.tensor(x.value), rtol=1e-5, atol=1e-5)


def test_nash_keeps_its_weights_between_updates(draw):
    G = draw(3, 5)
    losses = torch.ones(3)
    method = NashMTL(update_every=4)
    weights = []
    for step in range(9):
        M = None if step % 4 else (step + 1.0) * G @ G.T
        assert method.needs_gradients == (M is not None)
        weights.append(method(M, losses).double())
        if step == 5:
            restored = NashMTL(update_every=4)
            restored.load_state_dict(method.state_dict())
        if step > 5:
            assert torch.equal(restored(M, losses).double(), weights[-1])
    assert_close(weights[3], weights[0], rtol=1e-6, atol=0)
    assert_close(weights[7], weights[0] / math.sqrt(5), rtol=1e-6, atol=0)


def test_nash_that_fails_forgets_nothing():
    method = NashMTL(update_every=2)
    with pytest.raises(ValueError, match="finite"):
        method(torch.full((2, 2), float("nan"), dtype=torch.float64), None)
    assert method.memory == {} and method.needs_gradients


def test_nash_step_has_length_one_and_heads_the_full_weights(float64, shared_gradient):
    shared, heads, balancer = shared_gradient(Identity(), NashMTL())
    assert_close(heads, float64(4.25, 3.25) * balancer.weights)
    unbounded, *_ = shared_gradient(Identity(), NashMTL(max_norm=None))
    assert_close(unbounded.norm().item(), math.sqrt(2))
    assert_close(shared, unbounded / math.sqrt(2), rtol=1e-5, atol=0)


def test_nash_ignores_the_logarithm(shared_gradient):
    plain = shared_gradient(Identity(), NashMTL())[:2]
    logged = shared_gradient(Log(eps=0.0), NashMTL())[:2]
    assert_close(plain, logged)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_norm", 0.0),
        ("max_norm", float("inf")),
        ("update_every", 0),
        ("update_every", 1.5),
    ],
)
def test_nash_rejects(name, value):
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        NashMTL(**{name: value})

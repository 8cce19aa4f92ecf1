"""MGDA: weights by hand, the min-norm point by Clarabel, normalizations, heads."""

import cvxpy
import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.gradient_balancing.mgda import MGDA, divisors
from dbmtl.loss_balancing.log import Identity, Log


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random(tasks, dims, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, dims, generator=generator, dtype=torch.float64) + shift


def direction(method, G, losses=None):
    if losses is None:
        losses = torch.ones(len(G), dtype=torch.float64)
    return method(G @ G.T, losses) @ G


def interior(problem):
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return problem.value


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [1 / 5, 4 / 5]),
        ("l2", [1 / 4, 1 / 2]),
        ("loss", [1 / 5, 1 / 5]),
        ("loss+", [2 / 17, 1 / 17]),
    ],
)
def test_mgda_of_two_orthogonal_gradients(kind, expected):
    M = torch.diag(matrix(4.0, 1.0))
    losses = matrix(4.0, 1.0)
    assert_close(MGDA(kind)(M, losses), matrix(*expected))
    n = divisors(matrix(2.0, 1.0), losses, kind)
    assert_close(MGDA(kind, raw=True)(M, losses), matrix(*expected) * n)
    assert_close(MGDA(kind, times_tasks=True)(M, losses), 2 * matrix(*expected))


@pytest.mark.parametrize(("tasks", "dims"), [(2, 5), (3, 2), (6, 20), (11, 64)])
def test_mgda_is_the_min_norm_point(tasks, dims):
    G = random(tasks, dims, shift=0.4)
    w = MGDA()(G @ G.T, None)
    d = w @ G
    assert w.min() >= 0 and abs(w.sum() - 1) < 1e-12
    assert (G @ d >= d @ d - 1e-8).all()
    v = cvxpy.Variable(tasks, nonneg=True)
    least = interior(
        cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(G.numpy().T @ v)), [cvxpy.sum(v) == 1])
    )
    assert d @ d <= least + 1e-8


def test_mgda_normalizations_under_a_scaled_loss():
    G = random(4, 9)
    losses = matrix(0.5, 2.0, 1.0, 3.0)
    s = matrix(1e3, 1.0, 1e-2, 1.0)
    scaled = {
        kind: direction(MGDA(kind), G * s[:, None], losses * s) for kind in ("none", "l2", "loss")
    }
    for kind in ("l2", "loss"):
        assert_close(scaled[kind], direction(MGDA(kind), G, losses))
    assert scaled["none"].norm() < direction(MGDA("none"), G, losses).norm()


def test_mgda_with_a_bad_loss_names_it():
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"normalize='loss'.*positive"):
            MGDA("loss")(torch.eye(2, dtype=torch.float64), matrix(1.0, bad))
    assert_close(MGDA("loss+")(torch.diag(matrix(1.0, 0.0)), matrix(1.0, 0.0)), matrix(0.0, 1.0))
    with pytest.raises(ValueError, match="'L2'"):
        MGDA("L2")


def shared_gradient(transform, aggregator):
    theta = torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=True)
    head = torch.ones(2, dtype=torch.float64, requires_grad=True)
    balancer = Balancer(transform, aggregator, shared=[theta], num_tasks=2)
    centers = matrix([1.0, 0.0], [0.0, 2.0])
    losses = [head[t] * (theta - centers[t]).square().sum() for t in range(2)]
    balancer.backward(losses)
    return theta.grad, head.grad, balancer


def test_mgda_by_the_loss_is_mgda_of_the_logarithms():
    plain = shared_gradient(Identity(), MGDA("loss"))[0]
    assert_close(plain, shared_gradient(Log(eps=0.0), MGDA())[0])


def test_mgda_leaves_heads_alone_unless_told():
    raw = matrix(4.25, 3.25)
    assert_close(shared_gradient(Identity(), MGDA())[1], raw)
    _, weighted, balancer = shared_gradient(Identity(), MGDA(weights_heads=True))
    assert_close(weighted, raw * balancer.weights)

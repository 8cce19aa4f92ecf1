"""MGDA: weights by hand, the min-norm point by Clarabel, normalizations, heads."""

import cvxpy
import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.mgda import MGDA, divisors
from dbmtl.loss_balancing.log import Identity, Log


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("none", [1 / 5, 4 / 5]),
        ("l2", [1 / 4, 1 / 2]),
        ("loss", [1 / 5, 1 / 5]),
        ("loss+", [2 / 17, 1 / 17]),
    ],
)
def test_mgda_of_two_orthogonal_gradients(kind, expected, float64):
    M = torch.diag(float64(4.0, 1.0))
    losses = float64(4.0, 1.0)
    assert_close(MGDA(kind)(M, losses), float64(*expected))
    n = divisors(float64(2.0, 1.0), losses, kind)
    assert_close(MGDA(kind, raw=True)(M, losses), float64(*expected) * n)
    assert_close(MGDA(kind, times_tasks=True)(M, losses), 2 * float64(*expected))


@pytest.mark.parametrize(("tasks", "dims"), [(2, 5), (3, 2), (6, 20), (11, 64)])
def test_mgda_is_the_min_norm_point(tasks, dims, draw, clarabel):
    G = draw(tasks, dims, mean=0.4)
    w = MGDA()(G @ G.T, None)
    d = w @ G
    assert w.min() >= 0 and abs(w.sum() - 1) < 1e-12
    assert (G @ d >= d @ d - 1e-8).all()
    v = cvxpy.Variable(tasks, nonneg=True)
    least = clarabel(
        cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(G.numpy().T @ v)), [cvxpy.sum(v) == 1])
    )
    assert d @ d <= least + 1e-8


def test_mgda_normalizations_under_a_scaled_loss(float64, draw, direction):
    G = draw(4, 9)
    losses = float64(0.5, 2.0, 1.0, 3.0)
    s = float64(1e3, 1.0, 1e-2, 1.0)
    scaled = {
        kind: direction(MGDA(kind), G * s[:, None], losses * s) for kind in ("none", "l2", "loss")
    }
    for kind in ("l2", "loss"):
        assert_close(scaled[kind], direction(MGDA(kind), G, losses))
    assert scaled["none"].norm() < direction(MGDA("none"), G, losses).norm()


def test_mgda_with_a_bad_loss_names_it(float64):
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"normalize='loss'.*positive"):
            MGDA("loss")(torch.eye(2, dtype=torch.float64), float64(1.0, bad))
    assert_close(MGDA("loss+")(torch.diag(float64(1.0, 0.0)), float64(1.0, 0.0)), float64(0.0, 1.0))
    with pytest.raises(ValueError, match="'L2'"):
        MGDA("L2")


def test_mgda_by_the_loss_is_mgda_of_the_logarithms(shared_gradient):
    plain = shared_gradient(Identity(), MGDA("loss"))[0]
    assert_close(plain, shared_gradient(Log(eps=0.0), MGDA())[0])


def test_mgda_leaves_heads_alone_unless_told(float64, shared_gradient):
    raw = float64(4.25, 3.25)
    assert_close(shared_gradient(Identity(), MGDA())[1], raw)
    _, weighted, balancer = shared_gradient(Identity(), MGDA(weights_heads=True))
    assert_close(weighted, raw * balancer.weights)

"""CAGrad: weights by hand, the best direction of the ball by Clarabel, its limits."""

import math

import cvxpy
import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.cagrad import CAGrad, conflict_averse_weights
from dbmtl.gradient_balancing.mgda import MGDA


def test_cagrad_by_hand(float64):
    assert_close(conflict_averse_weights(torch.eye(2, dtype=torch.float64), 0.4), float64(0.7, 0.7))
    uneven = conflict_averse_weights(torch.diag(float64(4.0, 1.0)), 0.5)
    assert_close(uneven, float64(0.5, 0.5 + math.sqrt(1.25) / 2))
    M = torch.diag(float64(4.0, 1.0))
    for rescale, factor in ((0, 1.0), (1, 1.25), (2, 1.5)):
        assert_close(CAGrad(rescale=rescale)(M, None), uneven / factor)
    assert_close(CAGrad(rescale=0, times_tasks=True)(M, None), 2 * uneven)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 1.0, 3.0])
@pytest.mark.parametrize(("tasks", "dims"), [(2, 3), (3, 12), (6, 6), (11, 40)])
def test_cagrad_is_the_best_direction_of_the_ball(c, tasks, dims, draw, clarabel):
    G = draw(tasks, dims, seed=tasks, mean=0.1)
    d = conflict_averse_weights(G @ G.T, c) @ G
    g0 = G.mean(0)
    assert (d - g0).norm() <= c * g0.norm() * (1 + 1e-9)
    x = cvxpy.Variable(dims)
    worst = cvxpy.Variable()
    ball = cvxpy.norm(x - g0.numpy()) <= c * g0.norm().item()
    best = clarabel(cvxpy.Problem(cvxpy.Maximize(worst), [G.numpy() @ x >= worst, ball]))
    assert_close((G @ d).min().item(), best, rtol=1e-6, atol=1e-7)


def test_cagrad_of_zero_is_the_mean_and_of_much_is_mgda(draw):
    G = draw(5, 9)
    assert_close(conflict_averse_weights(G @ G.T, 0.0) @ G, G.mean(0))
    far = conflict_averse_weights(G @ G.T, 1e6) @ G
    least = MGDA()(G @ G.T, None) @ G
    assert_close(far / far.norm(), least / least.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "rows", [[[1.0, 0], [-1, 0], [0, 1]], [[1.0, 0], [0, 0]], [[2.0, 0], [-1, 0], [-1, 0], [1, 3]]]
)
def test_cagrad_harms_nobody_where_nobody_can_gain(c, rows, float64):
    G = float64(*rows)
    d = conflict_averse_weights(G @ G.T, c) @ G
    g0 = G.mean(0)
    assert (G @ d).min() > -1e-6
    assert (d - g0).norm() <= c * g0.norm() * (1 + 1e-6)


@pytest.mark.parametrize(
    "options", [{"c": -0.1}, {"c": float("nan")}, {"c": float("inf")}, {"rescale": 3}]
)
def test_cagrad_rejects(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CAGrad(**options)

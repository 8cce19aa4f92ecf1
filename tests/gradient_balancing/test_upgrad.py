"""UPGrad: half of PCGrad for two tasks, the mean of the projections by Clarabel, its option."""

import cvxpy
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.upgrad import UPGrad, upgrad_weights


def test_upgrad_of_two_tasks_is_half_of_pcgrad(draw, direction):
    for seed in range(6):
        G = draw(2, 3, seed=seed)
        a, b = G
        conflict = min(a @ b, 0)
        repaired = a - conflict / (b @ b) * b + b - conflict / (a @ a) * a
        assert_close(direction(UPGrad(), G), repaired / 2)


@pytest.mark.parametrize(("tasks", "dims"), [(3, 12), (6, 6), (11, 40)])
def test_upgrad_is_the_mean_of_the_projections(tasks, dims, draw, direction, clarabel):
    G = draw(tasks, dims, seed=tasks)
    x = cvxpy.Variable(dims)
    g = cvxpy.Parameter(dims)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - g)), [G.numpy() @ x >= 0])
    projections = []
    for row in G:
        g.value = row.numpy()
        clarabel(problem)
        projections.append(x.value)
    mean = torch.tensor(np.mean(projections, 0))
    assert_close(direction(UPGrad(), G), mean, rtol=0, atol=1e-6)


def test_upgrad_regularizer_is_in_units_of_the_trace(draw):
    M = draw(3, 5) @ draw(3, 5).T
    assert_close(upgrad_weights(M, 1e-2), upgrad_weights(M + 1e-2 * M.trace() * torch.eye(3)))
    assert_close(upgrad_weights(1e8 * M, 1e-2), upgrad_weights(M, 1e-2))


def test_upgrad_rejects():
    with pytest.raises(ValueError, match="reg_eps.*-1.0"):
        UPGrad(reg_eps=-1.0)

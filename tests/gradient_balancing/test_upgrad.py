"""UPGrad: half of PCGrad for two tasks, the mean of the projections by Clarabel, its option."""

import cvxpy
import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.upgrad import UPGrad, upgrad_weights


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


def test_upgrad_of_two_tasks_is_half_of_pcgrad():
    for seed in range(6):
        G = random(2, 3, seed)
        a, b = G
        conflict = min(a @ b, 0)
        repaired = a - conflict / (b @ b) * b + b - conflict / (a @ a) * a
        assert_close(direction(UPGrad(), G), repaired / 2)


@pytest.mark.parametrize(("tasks", "dims"), [(3, 12), (6, 6), (11, 40)])
def test_upgrad_is_the_mean_of_the_projections(tasks, dims):
    G = random(tasks, dims, seed=tasks)
    x = cvxpy.Variable(dims)
    g = cvxpy.Parameter(dims)
    problem = cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - g)), [G.numpy() @ x >= 0])
    projections = []
    for row in G:
        g.value = row.numpy()
        interior(problem)
        projections.append(x.value)
    mean = torch.tensor(np.mean(projections, 0))
    assert_close(direction(UPGrad(), G), mean, rtol=0, atol=1e-6)


def test_upgrad_regularizer_is_in_units_of_the_trace():
    M = random(3, 5) @ random(3, 5).T
    assert_close(upgrad_weights(M, 1e-2), upgrad_weights(M + 1e-2 * M.trace() * torch.eye(3)))
    assert_close(upgrad_weights(1e8 * M, 1e-2), upgrad_weights(M, 1e-2))


def test_upgrad_rejects():
    with pytest.raises(ValueError, match="reg_eps.*-1.0"):
        UPGrad(reg_eps=-1.0)

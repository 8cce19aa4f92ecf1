"""What the tests of several gradient methods share: random matrices, a network, exact solutions.

Everything is in float64. The fixtures are functions without state.
"""

import pytest
import torch
from torch import nn

from dbmtl.core.balancer import Balancer


@pytest.fixture(scope="session")
def float64():
    """A tensor of numbers, or of rows of numbers."""

    def tensor(*values):
        return torch.tensor(values, dtype=torch.float64)

    return tensor


@pytest.fixture(scope="session")
def draw():
    """Normally distributed numbers that depend on the shape and the seed alone."""

    def draw_normal(*shape, seed=0, mean=0.0):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(*shape, generator=generator, dtype=torch.float64) + mean

    return draw_normal


@pytest.fixture(scope="session")
def gram():
    """Scalar products of the rows of a matrix, [T, d] to [T, T]."""

    def gram_matrix(G):
        return G @ G.T

    return gram_matrix


@pytest.fixture(scope="session")
def direction():
    """Where a method on Gramians sends the shared parameters, [d], from gradients [T, d]."""

    def shared_direction(method, G, losses=None):
        if losses is None:
            losses = torch.ones(len(G), dtype=torch.float64)
        return method(G @ G.T, losses) @ G

    return shared_direction


@pytest.fixture(scope="session")
def clarabel():
    """The value of a problem of cvxpy, solved far more precisely than the tests compare."""

    def solve(problem):
        problem.solve(solver="CLARABEL", tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
        return problem.value

    return solve


@pytest.fixture(scope="session")
def jacobians():
    """Gradients of T tasks from some batches a step, [steps, batches, T, d]."""

    def draw_jacobians(T, steps=5, d=12, seed=0, batches=2):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(steps, batches, T, d, generator=generator, dtype=torch.float64)

    return draw_jacobians


@pytest.fixture(scope="session")
def task_rows():
    """The gradients [T, d] as a balancer hands them on: for each task a list of tensors, one, or
    two where the parameters are cut."""

    def lists_of_tensors(J, cut=None):
        if cut is None:
            return [[row] for row in J]
        return [[row[:cut].clone(), row[cut:].clone()] for row in J]

    return lists_of_tensors


@pytest.fixture(scope="session")
def network():
    """A trunk and the heads a and b, always with the same parameters."""

    def make_network():
        torch.manual_seed(0)
        sizes = {"trunk": (3, 4), "a": (4, 1), "b": (4, 1)}
        return nn.ModuleDict({name: nn.Linear(*size) for name, size in sizes.items()}).double()

    return make_network


@pytest.fixture(scope="session")
def losses_of():
    """The two losses of such a network on a batch."""

    def two_losses(net, seed):
        x = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)).double()
        z = net["trunk"](x).tanh()
        return [(net["a"](z) - 1).square().mean(), (3 * net["b"](z) + 2).square().mean()]

    return two_losses


@pytest.fixture(scope="session")
def shared_gradient():
    """A step on two quadratic losses: the gradients of trunk and heads, and the balancer."""

    def take_step(transform, aggregator):
        theta = torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=True)
        head = torch.ones(2, dtype=torch.float64, requires_grad=True)
        balancer = Balancer(transform, aggregator, shared=[theta], num_tasks=2)
        centers = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        losses = [head[t] * (theta - centers[t]).square().sum() for t in range(2)]
        balancer.backward(losses)
        return theta.grad, head.grad, balancer

    return take_step

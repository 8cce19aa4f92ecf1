"""Algorithm 1 of the paper on flat numpy vectors, against the balancer; and that breaking it is
noticed."""

import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl import DBMTL, EMA, Balancer, Identity, Log, MaxNorm, Sum, make_balancer
from dbmtl.core.inputs import Batch

SHAPES = [(2, 3), (), (4,)]  # a matrix, a scalar, a vector
TASKS = 3
SIZE = 11  # numbers in these shapes
ROWS = 5
RATE = 0.02


class Problem(NamedTuple):
    """l_t = |A_t theta - b_t - psi_t|^2 / 2 + c_t, with very different scales."""

    A: np.ndarray  # [TASKS, ROWS, SIZE]
    b: np.ndarray  # [TASKS, ROWS]
    psi: np.ndarray  # [TASKS, ROWS], where the heads start
    c: np.ndarray  # [TASKS]
    theta: np.ndarray  # [SIZE], where the shared parameters start


def problem():
    rng = np.random.default_rng(0)
    return Problem(
        A=rng.normal(size=(TASKS, ROWS, SIZE)) * np.array([1.0, 5.0, 0.2])[:, None, None],
        b=rng.normal(size=(TASKS, ROWS)),
        psi=rng.normal(size=(TASKS, ROWS)),
        c=np.array([0.1, 2.0, 0.03]),
        theta=np.linspace(-1, 1, SIZE),
    )


def algorithm_1(steps, beta=0.5, beta_decay=0.5, eps=1e-8):
    """Plain SGD by Algorithm 1: theta [steps, SIZE] and psi [steps, TASKS, ROWS] after steps."""
    A, b, psi, c, theta = problem()
    average = np.zeros((TASKS, SIZE))
    thetas = []
    psis = []
    for k in range(1, steps + 1):
        residual = np.einsum("trd,d->tr", A, theta) - b - psi
        loss = (residual**2).sum(1) / 2 + c
        g = np.einsum("tr,trd->td", residual, A) / (loss + eps)[:, None]
        beta_k = beta / k**beta_decay
        average = beta_k * average + (1 - beta_k) * g
        norm = np.sqrt((average**2).sum(1))
        step = norm.max() * (average / (norm + eps)[:, None]).sum(0)
        theta = theta - RATE * step
        psi = psi + RATE * residual / (loss + eps)[:, None]
        thetas.append(theta)
        psis.append(psi)
    return [np.stack(thetas), np.stack(psis)]


def trained(steps, make=DBMTL, **hyper):
    """The same with the balancer and `torch.optim.SGD`."""
    A, b, psi, c, theta = map(torch.from_numpy, problem())
    pieces = theta.split([int(np.prod(shape)) for shape in SHAPES])
    shared = []
    for piece, shape in zip(pieces, SHAPES, strict=True):
        shared.append(nn.Parameter(piece.reshape(shape).clone()))
    heads = [nn.Parameter(row.clone()) for row in psi]
    balancer = make(shared=shared, num_tasks=TASKS, **hyper)
    sgd = torch.optim.SGD([*shared, *heads], RATE)

    def flat():
        return torch.cat([p.reshape(-1) for p in shared])

    thetas = []
    psis = []
    for _ in range(steps):
        theta = flat()
        residuals = [A[t] @ theta - b[t] - heads[t] for t in range(TASKS)]
        balancer.backward([residuals[t].square().sum() / 2 + c[t] for t in range(TASKS)])
        sgd.step()
        sgd.zero_grad()
        thetas.append(flat().detach())
        psis.append(torch.stack(heads).detach())
    return [torch.stack(thetas), torch.stack(psis)]


HYPER = [
    {},
    {"beta": 0.9, "beta_decay": 0.0},
    {"beta": 0.1},
    {"beta": 0.0},
    {"beta": 0.9, "beta_decay": 1.0, "eps": 0.3},
]


@pytest.mark.parametrize("grads", ["loop", "split", "batched"])
@pytest.mark.parametrize("hyper", HYPER, ids=str)
def test_dbmtl_follows_algorithm_1(hyper, grads):
    trajectories = trained(8, **hyper, grads=grads)
    for ours, expected in zip(trajectories, algorithm_1(8, **hyper), strict=True):
        assert_close(ours, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_dbmtl_defaults_are_those_of_the_paper():
    balancer = DBMTL(shared=[nn.Parameter(torch.ones(1))], num_tasks=2)
    assert (balancer.ema.beta, balancer.ema.beta_decay) == (0.5, 0.5)
    assert balancer.transform.eps == balancer.aggregator.eps == 1e-8
    assert balancer.aggregator.alpha == "max"


def test_dbmtl_is_log_times_max_norm_and_has_the_name_of_the_tables():
    def on_the_plane(**options):
        return Balancer(Log(), MaxNorm(), ema=EMA(0.5, 0.5), **options)

    def by_name(**options):
        return make_balancer("DB-MTL", **options)

    for make in (on_the_plane, by_name):
        for ours, expected in zip(trained(4, make), trained(4), strict=True):
            assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, axes",
    [("EW", (Identity, Sum)), ("loss-only", (Log, Sum)), ("gradient-only", (Identity, MaxNorm))],
)
def test_ablation_names_are_points_of_the_plane(name, axes):
    transform, aggregator = axes

    def by_name(**options):
        return make_balancer(name, **options)

    def on_the_plane(**options):
        ema = EMA(0.5, 0.5) if aggregator is MaxNorm else None
        return Balancer(transform(), aggregator(), ema=ema, **options)

    for ours, expected in zip(trained(3, by_name), trained(3, on_the_plane), strict=True):
        assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_hand_computed_step():
    """Two tasks, one shared vector: l = (2, 0.5), g = ((3, 4), (0, 1)), worked out on paper with
    beta 0.5."""
    theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    balancer = DBMTL(shared=[theta], num_tasks=2, eps=0.0)
    balancer.backward([3 * theta[0] + 4 * theta[1] + 2, theta[1] + 0.5])
    # log: g = ((1.5, 2), (0, 2)); beta_1 = 0.5: ghat = ((0.75, 1), (0, 1)), norms (1.25, 1),
    # alpha = 1.25
    assert_close(balancer.slopes, torch.tensor([0.5, 2.0]).double())
    assert_close(balancer.weights, torch.tensor([1.0, 1.25]).double())
    assert_close(theta.grad, torch.tensor([0.75, 2.25]).double())


# -------------------------------------------------------------------------------------- mutations


def module_of(kind):
    return sys.modules[kind.__module__]


original_iterator = module_of(Batch).iterate_task_gradients


def without_heads(*args):
    for row, _ in original_iterator(*args):
        yield row, {}


def half_heads(*args):
    for row, heads in original_iterator(*args):
        yield row, {p: g / 2 for p, g in heads.items()}


def weights_by(formula):
    """The mutation that computes the weights of max-norm from norms n by another formula."""
    return module_of(MaxNorm), "equal_norm_weights", formula


def beta_by(formula):
    """The mutation that computes beta_k by another formula."""
    return module_of(EMA), "beta_at", formula


MUTATIONS = {
    "beta without decay": beta_by(lambda k, beta, decay: beta),
    "k from 2": beta_by(lambda k, beta, decay: beta / (k + 1) ** decay),
    "beta on the new value": beta_by(lambda k, beta, decay: 1 - beta / k**decay),
    "no moving average": beta_by(lambda k, beta, decay: 0.0),
    "no eps in the log": (Log, "forward", lambda self, losses: losses.log()),
    "no log": (Log, "forward", lambda self, losses: losses),
    "no eps beside the norm": weights_by(lambda n, alpha, eps: n.max() / n),
    "eps below the root": weights_by(lambda n, alpha, eps: n.max() / (n**2 + eps) ** 0.5),
    "mean for max": weights_by(lambda n, alpha, eps: n.mean() / (n + eps)),
    "min for max": weights_by(lambda n, alpha, eps: n.min() / (n + eps)),
    "no norms": weights_by(lambda n, alpha, eps: torch.ones_like(n)),
    "heads weighted": (MaxNorm, "weights_heads", True),
    "heads forgotten": (module_of(Batch), "iterate_task_gradients", without_heads),
    "heads halved": (module_of(Batch), "iterate_task_gradients", half_heads),
}


def agrees():
    for eps in (1e-8, 0.01):
        for ours, expected in zip(trained(4, eps=eps), algorithm_1(4, eps=eps), strict=True):
            if not np.allclose(ours.numpy(), expected, rtol=1e-10, atol=1e-10):
                return False
    return True


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_dbmtl_mutation_is_noticed(mutation, monkeypatch):
    assert agrees()
    monkeypatch.setattr(*MUTATIONS[mutation])
    assert not agrees()

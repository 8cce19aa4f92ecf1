"""Algorithm 1 of the paper on flat numpy vectors, against the balancer; and that breaking it is noticed."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

import dbmtl.core.ema
import dbmtl.core.inputs
import dbmtl.gradient_balancing.max_norm
from dbmtl import DBMTL, EMA, Balancer, Identity, Log, MaxNorm, Sum, make_balancer

SHAPES = [(2, 3), (), (4,)]  # a matrix, a scalar, a vector
TASKS, SIZE, ROWS, RATE = 3, 11, 5, 0.02


def problem(seed=0):
    """l_t = |A_t theta - b_t - psi_t|^2 / 2 + c_t, with very different scales."""
    rng = np.random.default_rng(seed)
    A = rng.normal(size=(TASKS, ROWS, SIZE)) * np.array([1.0, 5.0, 0.2])[:, None, None]
    return (
        A,
        rng.normal(size=(TASKS, ROWS)),
        rng.normal(size=(TASKS, ROWS)),
        np.array([0.1, 2.0, 0.03]),
    )


def algorithm_1(steps, beta=0.5, beta_decay=0.5, eps=1e-8):
    """Plain SGD by Algorithm 1: trajectories of theta [steps, SIZE] and psi [steps, TASKS, ROWS]."""
    A, b, psi, c = problem()
    theta, average, path = np.linspace(-1, 1, SIZE), np.zeros((TASKS, SIZE)), []
    for k in range(1, steps + 1):
        residual = np.einsum("trd,d->tr", A, theta) - b - psi
        loss = (residual**2).sum(1) / 2 + c
        g = np.einsum("tr,trd->td", residual, A) / (loss + eps)[:, None]
        beta_k = beta / k**beta_decay
        average = beta_k * average + (1 - beta_k) * g
        norm = np.sqrt((average**2).sum(1))
        step = norm.max() * (average / (norm + eps)[:, None]).sum(0)
        theta, psi = theta - RATE * step, psi + RATE * residual / (loss + eps)[:, None]
        path.append((theta, psi))
    return [np.stack(x) for x in zip(*path, strict=True)]


def trained(steps, make=DBMTL, **hyper):
    """The same with the balancer and `torch.optim.SGD`."""
    A, b, psi, c = (torch.from_numpy(x) for x in problem())
    start = torch.linspace(-1, 1, SIZE, dtype=torch.float64)
    sizes = [int(np.prod(shape)) for shape in SHAPES]
    shared = [
        nn.Parameter(p.reshape(s).clone()) for p, s in zip(start.split(sizes), SHAPES, strict=True)
    ]
    heads = [nn.Parameter(p.clone()) for p in psi]
    balancer, sgd = (
        make(shared=shared, num_tasks=TASKS, **hyper),
        torch.optim.SGD([*shared, *heads], RATE),
    )
    path = []
    for _ in range(steps):
        theta = torch.cat([p.reshape(-1) for p in shared])
        balancer.backward(
            [(A[t] @ theta - b[t] - heads[t]).square().sum() / 2 + c[t] for t in range(TASKS)]
        )
        sgd.step()
        sgd.zero_grad()
        path.append(
            (torch.cat([p.detach().reshape(-1) for p in shared]), torch.stack(heads).detach())
        )
    return [torch.stack(x) for x in zip(*path, strict=True)]


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
    for ours, expected in zip(
        trained(8, **hyper, grads=grads), algorithm_1(8, **hyper), strict=True
    ):
        assert_close(ours, torch.from_numpy(expected), rtol=1e-12, atol=1e-12)


def test_dbmtl_defaults_are_those_of_the_paper():
    balancer = DBMTL(shared=[nn.Parameter(torch.ones(1))], num_tasks=2)
    assert (balancer.ema.beta, balancer.ema.beta_decay) == (0.5, 0.5)
    assert balancer.transform.eps == balancer.aggregator.eps == 1e-8
    assert balancer.aggregator.alpha == "max"


def test_dbmtl_is_log_times_max_norm_and_has_the_name_of_the_tables():
    plane = lambda **k: Balancer(Log(), MaxNorm(), ema=EMA(0.5, 0.5), **k)  # noqa: E731
    named = lambda **k: make_balancer("DB-MTL", **k)  # noqa: E731
    for other in (plane, named):
        for ours, expected in zip(trained(4, other), trained(4), strict=True):
            assert_close(ours, expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    "name, axes",
    [("EW", (Identity, Sum)), ("loss-only", (Log, Sum)), ("gradient-only", (Identity, MaxNorm))],
)
def test_ablation_names_are_points_of_the_plane(name, axes):
    transform, aggregator = axes
    ema = EMA(0.5, 0.5) if aggregator is MaxNorm else None
    for ours, expected in zip(
        trained(3, lambda **k: make_balancer(name, **k)),
        trained(3, lambda **k: Balancer(transform(), aggregator(), ema=ema, **k)),
        strict=True,
    ):
        assert_close(ours, expected, rtol=1e-13, atol=1e-13)


def test_hand_computed_step():
    """Two tasks, one shared vector: l = (2, 0.5), g = ((3, 4), (0, 1)), worked out on paper with beta 0.5."""
    theta = nn.Parameter(torch.zeros(2, dtype=torch.float64))
    balancer = DBMTL(shared=[theta], num_tasks=2, eps=0.0)
    balancer.backward([3 * theta[0] + 4 * theta[1] + 2, theta[1] + 0.5])
    # log: g = ((1.5, 2), (0, 2)); beta_1 = 0.5: ghat = ((0.75, 1), (0, 1)), norms (1.25, 1), alpha = 1.25
    assert_close(balancer.slopes, torch.tensor([0.5, 2.0]).double())
    assert_close(balancer.weights, torch.tensor([1.0, 1.25]).double())
    assert_close(theta.grad, torch.tensor([0.75, 2.25]).double())


# ------------------------------------------------------------------------------------------------------ mutations


def without_heads(*args):
    for row, _ in original_iterator(*args):
        yield row, {}


def half_heads(*args):
    for row, rest in original_iterator(*args):
        yield row, {p: g / 2 for p, g in rest.items()}


original_iterator = dbmtl.core.inputs.iterate_task_gradients
MUTATIONS = {
    "beta without decay": (dbmtl.core.ema, "beta_at", lambda k, beta, decay: beta),
    "k from 2": (dbmtl.core.ema, "beta_at", lambda k, beta, decay: beta / (k + 1) ** decay),
    "beta on the new value": (
        dbmtl.core.ema,
        "beta_at",
        lambda k, beta, decay: 1 - beta / k**decay,
    ),
    "no moving average": (dbmtl.core.ema, "beta_at", lambda k, beta, decay: 0.0),
    "no eps in the log": (Log, "forward", lambda self, losses: losses.log()),
    "no log": (Log, "forward", lambda self, losses: losses),
    "no eps beside the norm": (
        dbmtl.gradient_balancing.max_norm,
        "equal_norm_weights",
        lambda n, alpha, eps: n.max() / n,
    ),
    "eps below the root": (
        dbmtl.gradient_balancing.max_norm,
        "equal_norm_weights",
        lambda n, alpha, eps: n.max() / (n**2 + eps) ** 0.5,
    ),
    "mean for max": (
        dbmtl.gradient_balancing.max_norm,
        "equal_norm_weights",
        lambda n, alpha, eps: n.mean() / (n + eps),
    ),
    "min for max": (
        dbmtl.gradient_balancing.max_norm,
        "equal_norm_weights",
        lambda n, alpha, eps: n.min() / (n + eps),
    ),
    "no norms": (
        dbmtl.gradient_balancing.max_norm,
        "equal_norm_weights",
        lambda n, alpha, eps: torch.ones_like(n),
    ),
    "heads weighted": (MaxNorm, "weights_heads", True),
    "heads forgotten": (dbmtl.core.inputs, "iterate_task_gradients", without_heads),
    "heads halved": (dbmtl.core.inputs, "iterate_task_gradients", half_heads),
}


def agrees():
    return all(
        np.allclose(ours.numpy(), expected, rtol=1e-10, atol=1e-10)
        for eps in (1e-8, 0.01)
        for ours, expected in zip(trained(4, eps=eps), algorithm_1(4, eps=eps), strict=True)
    )


@pytest.mark.parametrize("mutation", MUTATIONS)
def test_dbmtl_mutation_is_noticed(mutation, monkeypatch):
    assert agrees()
    monkeypatch.setattr(*MUTATIONS[mutation])
    assert not agrees()

"""MGDA, CAGrad, Nash-MTL, FairGrad and UPGrad: hand-computed weights, independent routes, edges."""

import math

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.gradient_balancing.cagrad import CAGrad, conflict_averse_weights
from dbmtl.gradient_balancing.mgda import MGDA, divisors
from dbmtl.gradient_balancing.nash_mtl import FairGrad, NashMTL
from dbmtl.gradient_balancing.upgrad import UPGrad, upgrad_weights
from dbmtl.loss_balancing.log import Identity, Log

ALL = [MGDA(), MGDA("l2"), MGDA("loss"), MGDA("loss+"), CAGrad(), NashMTL(), FairGrad(), UPGrad()]
named = pytest.mark.parametrize("method", ALL, ids=repr)


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def random(tasks, dims, seed=0, shift=0.0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tasks, dims, generator=generator, dtype=torch.float64) + shift


def direction(method, G, losses=None):
    losses = torch.ones(len(G), dtype=torch.float64) if losses is None else losses
    return method(G @ G.T, losses) @ G


def interior(problem):
    problem.solve(solver=cvxpy.CLARABEL, tol_gap_abs=1e-10, tol_gap_rel=1e-10, tol_feas=1e-10)
    return problem.value


# ------------------------------------------------------------------------------------------------------------- MGDA


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
    M, losses = torch.diag(matrix(4.0, 1.0)), matrix(4.0, 1.0)
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
    G, losses, s = random(4, 9), matrix(0.5, 2.0, 1.0, 3.0), matrix(1e3, 1.0, 1e-2, 1.0)
    for kind in ("l2", "loss"):
        assert_close(
            direction(MGDA(kind), G * s[:, None], losses * s), direction(MGDA(kind), G, losses)
        )
    longer = direction(MGDA("none"), G * s[:, None], losses * s)
    assert longer.norm() < direction(MGDA("none"), G, losses).norm()


def test_mgda_with_a_bad_loss_names_it():
    for bad in (0.0, -1.0):
        with pytest.raises(ValueError, match=r"normalize='loss'.*positive"):
            MGDA("loss")(torch.eye(2, dtype=torch.float64), matrix(1.0, bad))
    assert_close(MGDA("loss+")(torch.diag(matrix(1.0, 0.0)), matrix(1.0, 0.0)), matrix(0.0, 1.0))
    with pytest.raises(ValueError, match="'L2'"):
        MGDA("L2")


def shared_gradient(transform, aggregator, steps=1):
    theta = torch.tensor([-1.0, 0.5], dtype=torch.float64, requires_grad=True)
    head = torch.ones(2, dtype=torch.float64, requires_grad=True)
    balancer = Balancer(transform, aggregator, shared=[theta], num_tasks=2)
    centers = matrix([1.0, 0.0], [0.0, 2.0])
    for _ in range(steps):
        theta.grad = head.grad = None
        balancer.backward(
            [h * ((theta - c) ** 2).sum() for h, c in zip(head, centers, strict=True)]
        )
    return theta.grad, head.grad, balancer


def test_mgda_by_the_loss_is_mgda_of_the_logarithms():
    plain = shared_gradient(Identity(), MGDA("loss"))[0]
    assert_close(plain, shared_gradient(Log(eps=0.0), MGDA())[0])


def test_mgda_leaves_heads_alone_unless_told():
    raw = matrix(4.25, 3.25)
    assert_close(shared_gradient(Identity(), MGDA())[1], raw)
    _, weighted, balancer = shared_gradient(Identity(), MGDA(weights_heads=True))
    assert_close(weighted, raw * balancer.weights)


# ----------------------------------------------------------------------------------------------------------- CAGrad


def test_cagrad_by_hand():
    assert_close(conflict_averse_weights(torch.eye(2, dtype=torch.float64), 0.4), matrix(0.7, 0.7))
    uneven = conflict_averse_weights(torch.diag(matrix(4.0, 1.0)), 0.5)
    assert_close(uneven, matrix(0.5, 0.5 + math.sqrt(1.25) / 2))
    for rescale, factor in ((0, 1.0), (1, 1.25), (2, 1.5)):
        assert_close(CAGrad(rescale=rescale)(torch.diag(matrix(4.0, 1.0)), None), uneven / factor)
    assert_close(
        CAGrad(rescale=0, times_tasks=True)(torch.diag(matrix(4.0, 1.0)), None), 2 * uneven
    )


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9, 1.0, 3.0])
@pytest.mark.parametrize(("tasks", "dims"), [(2, 3), (3, 12), (6, 6), (11, 40)])
def test_cagrad_is_the_best_direction_of_the_ball(c, tasks, dims):
    G = random(tasks, dims, seed=tasks, shift=0.1)
    d, g0 = conflict_averse_weights(G @ G.T, c) @ G, G.mean(0)
    assert (d - g0).norm() <= c * g0.norm() * (1 + 1e-9)
    x, worst = cvxpy.Variable(dims), cvxpy.Variable()
    ball = cvxpy.norm(x - g0.numpy()) <= c * g0.norm().item()
    best = interior(cvxpy.Problem(cvxpy.Maximize(worst), [G.numpy() @ x >= worst, ball]))
    assert_close((G @ d).min().item(), best, rtol=1e-6, atol=1e-7)


def test_cagrad_of_zero_is_the_mean_and_of_much_is_mgda():
    G = random(5, 9)
    assert_close(conflict_averse_weights(G @ G.T, 0.0) @ G, G.mean(0))
    far, least = conflict_averse_weights(G @ G.T, 1e6) @ G, direction(MGDA(), G)
    assert_close(far / far.norm(), least / least.norm(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("c", [0.5, 1.0, 2.0])
@pytest.mark.parametrize(
    "rows", [[[1.0, 0], [-1, 0], [0, 1]], [[1.0, 0], [0, 0]], [[2.0, 0], [-1, 0], [-1, 0], [1, 3]]]
)
def test_cagrad_harms_nobody_where_nobody_can_gain(c, rows):
    G = matrix(*rows)
    d, g0 = conflict_averse_weights(G @ G.T, c) @ G, G.mean(0)
    assert (G @ d).min() > -1e-6
    assert (d - g0).norm() <= c * g0.norm() * (1 + 1e-6)


@pytest.mark.parametrize(
    "options", [{"c": -0.1}, {"c": float("nan")}, {"c": float("inf")}, {"rescale": 3}]
)
def test_cagrad_rejects(options):
    with pytest.raises(ValueError, match=next(iter(options))):
        CAGrad(**options)


# ------------------------------------------------------------------------------------------- Nash-MTL and FairGrad


def test_nash_of_two_tasks_in_closed_form():
    assert_close(NashMTL()(torch.diag(matrix(9.0, 0.25)), None), matrix(1 / 3, 2.0))
    for seed in range(5):
        G = random(2, 4, seed)
        cosine = torch.nn.functional.cosine_similarity(*G, dim=0)
        assert_close(NashMTL()(G @ G.T, None), 1 / (G.norm(dim=1) * (1 + cosine).sqrt()))


@pytest.mark.parametrize("tasks", [2, 5, 11, 40])
def test_nash_solves_its_equation_blind_to_scale(tasks):
    G = random(tasks, 2 * tasks, seed=tasks)
    a = NashMTL()(G @ G.T, None)
    assert_close(a * (G @ G.T @ a), torch.ones_like(a), rtol=1e-9, atol=0)
    assert_close((a @ G).norm().item(), math.sqrt(tasks))
    s = torch.logspace(-5, 5, tasks, dtype=torch.float64)
    assert_close(NashMTL()(G @ G.T * s * s[:, None], None) * s, a, rtol=1e-8, atol=0)


def test_nash_is_the_largest_product_of_gains():
    G = random(4, 6)
    x = cvxpy.Variable(6)
    interior(
        cvxpy.Problem(cvxpy.Maximize(cvxpy.sum(cvxpy.log(G.numpy() @ x))), [cvxpy.norm(x) <= 2.0])
    )
    assert_close(direction(NashMTL(), G), torch.tensor(x.value), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("alpha", [0.5, 2.0, 4.0])
def test_fairgrad_is_the_fairest_share(alpha):
    G = random(4, 6)
    a = FairGrad(alpha)(G @ G.T, None)
    assert_close(G @ (a @ G), a ** (-1 / alpha), rtol=1e-8, atol=0)
    x = cvxpy.Variable(6)
    utility = cvxpy.sum(cvxpy.power(G.numpy() @ x, 1 - alpha)) / (1 - alpha)
    interior(cvxpy.Problem(cvxpy.Maximize(utility), [cvxpy.norm(x) <= 1.0]))
    d = a @ G
    assert_close(d / d.norm(), torch.tensor(x.value), rtol=0, atol=1e-4)


def test_fairgrad_between_the_sum_and_mgda():
    G = random(3, 8, shift=0.3)
    assert_close(FairGrad(0.0)(G @ G.T, None), torch.ones(3, dtype=torch.float64))
    assert_close(FairGrad(1.0)(G @ G.T, None), NashMTL()(G @ G.T, None))
    far, least = direction(FairGrad(1000.0), G), direction(MGDA(), G)
    assert_close(far / far.norm(), least / least.norm(), rtol=0, atol=5e-3)
    assert_close(FairGrad()(torch.diag(matrix(4.0, 1.0)), None), matrix(4 ** (-2 / 3), 1.0))


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_fairgrad_length_under_a_common_scale(alpha):
    G = random(3, 8)
    expected = 100 ** ((1 - alpha) / (1 + alpha)) * direction(FairGrad(alpha), G)
    assert_close(direction(FairGrad(alpha), 100 * G), expected, rtol=1e-7, atol=0)


def test_nash_keeps_its_weights_between_updates():
    G, losses = random(3, 5), torch.ones(3)
    method = NashMTL(update_every=4)
    weights = []
    for step in range(9):
        assert method.needs_gradients == (step % 4 == 0)
        weights.append(method(None if step % 4 else (step + 1.0) * G @ G.T, losses).double())
        if step == 5:
            restored = NashMTL(update_every=4)
            restored.load_state_dict(method.state_dict())
        if step > 5:
            again = restored(None if step % 4 else (step + 1.0) * G @ G.T, losses).double()
            assert torch.equal(again, weights[-1])
    assert_close(weights[3], weights[0], rtol=1e-6, atol=0)
    assert_close(weights[7], weights[0] / math.sqrt(5), rtol=1e-6, atol=0)


def test_nash_that_fails_forgets_nothing():
    method = NashMTL(update_every=2)
    with pytest.raises(ValueError, match="finite"):
        method(torch.full((2, 2), float("nan"), dtype=torch.float64), None)
    assert method.memory == {} and method.needs_gradients


def test_nash_step_has_length_one_and_heads_the_full_weights():
    shared, heads, balancer = shared_gradient(Identity(), NashMTL())
    assert_close(heads, matrix(4.25, 3.25) * balancer.weights)
    unbounded, *_ = shared_gradient(Identity(), NashMTL(max_norm=None))
    assert_close(unbounded.norm().item(), math.sqrt(2))
    assert_close(shared, unbounded / math.sqrt(2), rtol=1e-5, atol=0)


def test_nash_ignores_the_logarithm():
    plain, logged = (
        shared_gradient(transform, NashMTL())[:2] for transform in (Identity(), Log(eps=0.0))
    )
    assert_close(plain, logged)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (NashMTL, {"max_norm": 0.0}),
        (NashMTL, {"max_norm": float("inf")}),
        (NashMTL, {"update_every": 0}),
        (NashMTL, {"update_every": 1.5}),
        (FairGrad, {"alpha": -1.0}),
        (FairGrad, {"alpha": float("inf")}),
        (FairGrad, {"max_norm": -1.0}),
        (UPGrad, {"reg_eps": -1.0}),
    ],
)
def test_nash_fairgrad_upgrad_reject(make, options):
    (name, value), *_ = options.items()
    with pytest.raises(ValueError, match=f"{name}.*{value}"):
        make(**options)


# ----------------------------------------------------------------------------------------------------------- UPGrad


def test_upgrad_of_two_tasks_is_half_of_pcgrad():
    for seed in range(6):
        G = random(2, 3, seed)
        (a, b), inner = G, G[0] @ G[1]
        repaired = a - min(inner, 0) / (b @ b) * b + b - min(inner, 0) / (a @ a) * a
        assert_close(direction(UPGrad(), G), repaired / 2)


@pytest.mark.parametrize(("tasks", "dims"), [(3, 12), (6, 6), (11, 40)])
def test_upgrad_is_the_mean_of_the_projections(tasks, dims):
    G = random(tasks, dims, seed=tasks)
    x, g = cvxpy.Variable(dims), cvxpy.Parameter(dims)
    problem, rows = (
        cvxpy.Problem(cvxpy.Minimize(cvxpy.sum_squares(x - g)), [G.numpy() @ x >= 0]),
        [],
    )
    for row in G:
        g.value = row.numpy()
        interior(problem)
        rows.append(x.value)
    assert_close(direction(UPGrad(), G), torch.tensor(np.mean(rows, 0)), rtol=0, atol=1e-6)


def test_upgrad_regularizer_is_in_units_of_the_trace():
    M = random(3, 5) @ random(3, 5).T
    assert_close(upgrad_weights(M, 1e-2), upgrad_weights(M + 1e-2 * M.trace() * torch.eye(3)))
    assert_close(upgrad_weights(1e8 * M, 1e-2), upgrad_weights(M, 1e-2))


# ------------------------------------------------------------------------------------------------------ all of them


@named
def test_solver_methods_with_one_task(method):
    w = method(matrix([25.0]), matrix(3.0))
    assert w.shape == (1,) and w > 0 and w.isfinite()


@named
def test_solver_methods_with_zero_gradients(method):
    for tasks in (1, 3):
        w = method(torch.zeros(tasks, tasks, dtype=torch.float64), torch.ones(tasks))
        assert w.shape == (tasks,) and w.isfinite().all()
    G = random(3, 6)
    G[1] = 0
    assert method(G @ G.T, torch.ones(3)).isfinite().all()


@named
def test_solver_methods_follow_a_permutation_of_tasks(method):
    G, losses, order = (
        random(5, 12),
        torch.arange(1.0, 6.0, dtype=torch.float64),
        torch.tensor([3, 0, 4, 2, 1]),
    )
    expected = method(G @ G.T, losses)[order]
    assert_close(method(G[order] @ G[order].T, losses[order]), expected, rtol=1e-7, atol=1e-9)


@named
def test_solver_methods_harm_no_task(method):
    G = random(4, 30, seed=3)
    d = direction(method, G, torch.arange(1.0, 5.0, dtype=torch.float64))
    if isinstance(method, CAGrad):
        assert d @ G.mean(0) > 0
    else:
        assert (G @ d).min() > -1e-9


@named
def test_solver_methods_evaluate_their_repr(method):
    names = {
        "MGDA": MGDA,
        "CAGrad": CAGrad,
        "NashMTL": NashMTL,
        "FairGrad": FairGrad,
        "UPGrad": UPGrad,
    }
    again = eval(repr(method), names)
    assert repr(again) == repr(method)


@named
def test_solver_methods_in_single_precision(method):
    G, losses = random(4, 30), torch.arange(1.0, 5.0)
    w = method((G @ G.T).float(), losses)
    assert w.dtype == torch.float32
    assert_close(w.double(), method(G @ G.T, losses.double()), rtol=1e-4, atol=1e-6)


@named
@settings(max_examples=25, deadline=None)
@given(st.data())
def test_solver_methods_survive_what_gradients_can_be(method, data):
    tasks, dims = data.draw(st.integers(1, 6)), data.draw(st.integers(1, 8))
    rows = random(tasks, dims, data.draw(st.integers(0, 10_000)))
    for row in range(tasks):
        kind = data.draw(st.sampled_from(["as it is", "zero", "copy", "opposite"]))
        if kind != "as it is":
            rows[row] = {"zero": 0, "copy": 1, "opposite": -1}[kind] * rows[0]
    rows *= (
        10.0
        ** torch.tensor(data.draw(st.lists(st.integers(-8, 8), min_size=tasks, max_size=tasks)))[
            :, None
        ]
    )
    w = method(rows @ rows.T, torch.ones(tasks, dtype=torch.float64))
    assert w.shape == (tasks,) and w.isfinite().all() and (w >= 0).all()

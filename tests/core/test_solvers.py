"""The solvers from outside: cases by hand, SciPy and Clarabel, certificates, and corner cases."""

import cvxpy as cp
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import lsq_linear, nnls, root
from torch.testing import assert_close

from dbmtl.core import solvers
from dbmtl.core.solvers import (
    cagrad_weights,
    dual_cone_weights,
    min_norm_weights,
    power_weights,
    project_simplex,
)

F64 = torch.float64
TIGHT = {"tol_gap_abs": 1e-13, "tol_gap_rel": 1e-13, "tol_feas": 1e-13, "max_iter": 200}
ON_M = {
    "min norm": min_norm_weights,
    "cagrad": lambda M: cagrad_weights(M, 0.4),
    "cagrad, c above 1": lambda M: cagrad_weights(M, 1.5),
    "nash": power_weights,
    "fairgrad": lambda M: power_weights(M, 2.0),
    "upgrad": lambda M: dual_cone_weights(
        M, torch.eye(len(M), dtype=M.dtype, device=M.device) / len(M)
    ).sum(0),
    "dual projection": lambda M: dual_cone_weights(
        M, torch.full((1, len(M)), 1 / len(M), dtype=M.dtype)
    )[0],
}
SIMPLEX = ("min norm", "cagrad", "cagrad, c above 1")
KINDS = ["keep", "zero", "copy", "negate", "1e-8", "1e8"]
every = pytest.mark.parametrize("name", ON_M)


def tensor(*values):
    return torch.tensor(values, dtype=F64)


def jacobian(T, d=None, seed=0, common=0.0):
    generator = torch.Generator().manual_seed(100 * T + seed)
    d = d or max(30, 2 * T)
    return torch.randn(T, d, generator=generator, dtype=F64) + common * torch.randn(
        d, generator=generator, dtype=F64
    )


def conflicting(T, seed=0, d=None):
    """Gradients that almost add up to zero: many conflicts, still regular."""
    J = jacobian(T, d, seed)
    return J - 0.9 * J.mean(0)


def gramians(T, count=4):
    for seed in range(count):
        J = conflicting(T, seed) if seed % 2 else jacobian(T, seed=seed, common=0.3 * seed)
        yield J @ J.T


def solved(*arguments):
    problem = cp.Problem(*arguments)
    problem.solve(cp.CLARABEL, **TIGHT)
    return problem


def simplex_kkt(M, w):
    """Of min w'Mw over the simplex, in cosines and lengths: 0 at the optimum."""
    length = M.diagonal().sqrt()
    x, y = w * length, (M @ w - w @ M @ w) / length
    return (torch.minimum(x, y).abs().max() / x.sum()).item()


def cagrad_objective(M, w, c):
    return w @ M.mean(1) + c * M.mean().sqrt() * (w @ M @ w).clamp(min=0).sqrt()


def cagrad_gap(M, w, c):
    """By duality no w is better than the worst gain of the direction that w gives."""
    gain = M.mean(1) + c * M.mean().sqrt() * (M @ w) / (w @ M @ w).sqrt()
    return ((cagrad_objective(M, w, c) - gain.min()) / M.diagonal().mean()).item()


# -------------------------------------------------------------------------------------- the simplex


def test_simplex_by_hand():
    assert_close(project_simplex(tensor(1.0, 0.6, -1.0)), tensor(0.7, 0.3, 0.0))
    assert_close(project_simplex(tensor(-7.0)), tensor(1.0))
    assert_close(project_simplex(tensor(1e300, 0.0)), tensor(1.0, 0.0))
    assert project_simplex(torch.ones(2, 3, 4)).shape == (2, 3, 4)
    assert project_simplex(torch.ones(3, dtype=torch.float32)).dtype == torch.float32


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=1, max_size=64))
def test_simplex_projection_is_feasible_and_optimal(values):
    v = tensor(*values)
    w = project_simplex(v)
    assert (w >= 0).all()
    assert_close(w.sum(), torch.ones((), dtype=F64), rtol=0, atol=1e-12)
    # optimal if no vertex e_t makes (v - w).(e_t - w) positive
    assert ((v - w).max() - (v - w) @ w) < 1e-9


# -------------------------------------------------------------------------------- hand-solved cases


def test_min_norm_by_hand():
    assert_close(min_norm_weights(torch.diag(tensor(1.0, 4.0))), tensor(0.8, 0.2))
    # exact, where LibMTL has 0.999
    assert min_norm_weights(tensor([1.0, 2.0], [2.0, 9.0])).tolist() == [1, 0]
    assert min_norm_weights(tensor([9.0, 2.0], [2.0, 1.0])).tolist() == [0, 1]
    tie = min_norm_weights(tensor([9.0, 1.0], [1.0, 1.0]))
    assert_close(tie, tensor(0.0, 1.0), rtol=0, atol=1e-15)
    assert_close(min_norm_weights(tensor([1.0, -2.0], [-2.0, 4.0])), tensor(2.0, 1.0) / 3)
    # (1, 0), (0, 1), (1, 1): the third is longer and useless
    assert_close(
        min_norm_weights(tensor([1.0, 0.0, 1.0], [0.0, 1.0, 1.0], [1.0, 1.0, 2.0])),
        tensor(0.5, 0.5, 0.0),
    )


def test_dual_cone_by_hand():
    M = tensor([1.0, -1.0], [-1.0, 2.0])
    assert_close(dual_cone_weights(M, torch.eye(2, dtype=F64)), tensor([1.0, 0.5], [1.0, 1.0]))
    assert_close(dual_cone_weights(M.abs(), torch.eye(2, dtype=F64)), torch.eye(2, dtype=F64))
    # u is below zero: v = 0 is best
    assert_close(dual_cone_weights(M, tensor([-1.0, -2.0])), tensor([0.0, 0.0]))
    assert dual_cone_weights(M, torch.zeros(0, 2)).shape == (0, 2)


def test_cagrad_by_hand():
    line = tensor([4.0, -2.0], [-2.0, 1.0])
    assert cagrad_weights(line, 0.5).tolist() == [0, 1]
    assert_close(cagrad_weights(line, 2.0), tensor(1.0, 2.0) / 3, rtol=0, atol=1e-8)
    assert_close(cagrad_weights(torch.eye(3, dtype=F64), 0.4), torch.full((3,), 1 / 3, dtype=F64))
    # lengths 1 and 2, orthogonal, c = 0: g_t.g_0 is 0.5 and 2
    assert cagrad_weights(torch.diag(tensor(1.0, 4.0)), 0.0).tolist() == [1, 0]
    assert cagrad_weights(torch.eye(2, dtype=F64), 0.0).tolist() == [0.5, 0.5]


def test_power_by_hand():
    M = torch.diag(tensor(4.0, 1.0))
    assert_close(power_weights(M), tensor(0.5, 1.0))
    assert_close(power_weights(torch.diag(tensor(8.0, 1.0)), 2.0), tensor(0.25, 1.0))
    assert_close(power_weights(tensor([16.0]), 3.0), tensor(1 / 8))
    assert power_weights(M, 0.0).tolist() == [1, 1]
    assert_close(power_weights(M, 1e-3), tensor(1.0, 1.0), rtol=0, atol=2e-3)


# ------------------------------------------------------------------------------- independent routes


@pytest.mark.parametrize("T", [2, 3, 11, 40, 64])
def test_min_norm_against_clarabel_and_kkt(T):
    for M in gramians(T):
        w = min_norm_weights(M)
        v = cp.Variable(T)
        L = np.linalg.cholesky(M.numpy()).T
        problem = solved(cp.Minimize(cp.sum_squares(L @ v)), [v >= 0, cp.sum(v) == 1])
        assert w @ M @ w < problem.value * (1 + 1e-8)
        assert_close(w, torch.from_numpy(v.value), rtol=0, atol=1e-5)
        assert simplex_kkt(M, w) < 1e-13


@pytest.mark.parametrize("T", [3, 11])
def test_min_norm_against_nnls(T):
    for M in gramians(T):
        L = np.linalg.cholesky(M.numpy() + 1)  # Wolfe's trick, solved by another algorithm
        x, _ = nnls(L.T, np.linalg.solve(L, np.ones(T)))
        assert_close(min_norm_weights(M), torch.from_numpy(x / x.sum()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("T", [2, 3, 11, 40, 64])
def test_dual_cone_against_scipy_and_kkt(T):
    for M in gramians(T, 2):
        U = torch.eye(T, dtype=F64)
        V = dual_cone_weights(M, U)
        assert (V >= U).all()
        image = V @ M
        assert image.min() > -1e-11 * M.max() and ((V - U) * image).abs().max() < 1e-10 * M.max()
        L = np.linalg.cholesky(M.numpy())
        for k in {0, T // 2}:
            found = lsq_linear(
                L.T, np.zeros(T), (U[k].numpy(), np.full(T, np.inf)), method="bvls", tol=1e-14
            )
            assert_close(V[k], torch.from_numpy(found.x), rtol=0, atol=1e-8)


@pytest.mark.parametrize("c", [1e-6, 0.1, 0.4, 0.9, 3.0])
@pytest.mark.parametrize("T", [2, 3, 11, 40, 64])
def test_cagrad_duality_gap(T, c):
    for M in gramians(T):
        w = cagrad_weights(M, c)
        assert (w >= 0).all()
        assert_close(w.sum(), torch.ones((), dtype=F64), rtol=0, atol=1e-14)
        assert -1e-13 < cagrad_gap(M, w, c) < 1e-10


@pytest.mark.parametrize("T", [2, 3, 11, 40])
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
def test_cagrad_against_clarabel(T):
    for M in gramians(T, 2):
        C = (M / M.diagonal().mean()).numpy()
        v = cp.Variable(T)
        L = np.linalg.cholesky(C).T
        mean = C.mean(1)
        size = np.sqrt(C.mean())
        solved(cp.Minimize(mean @ v + 0.4 * size * cp.norm(L @ v)), [v >= 0, cp.sum(v) == 1])
        w = cagrad_weights(M, 0.4)
        theirs = torch.from_numpy(v.value)
        assert_close(w, theirs, rtol=0, atol=1e-5)
        ours = cagrad_objective(M, w, 0.4)
        assert ours < cagrad_objective(M, theirs / theirs.sum(), 0.4) + 1e-8 * M.diagonal().mean()


@pytest.mark.parametrize("alpha", [0.25, 0.5, 1.0, 2.0, 5.0])
@pytest.mark.parametrize("T", [1, 2, 3, 11, 40, 64])
def test_power_solves_its_equation(T, alpha):
    for M in gramians(T):
        a = power_weights(M, alpha)
        assert (a > 0).all()
        assert_close(M @ a, a ** (-1 / alpha), rtol=1e-9, atol=0)


@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
def test_power_against_scipy_and_clarabel():
    M = jacobian(4)
    M = M @ M.T
    start = -2 / 3 * np.log(M.diagonal().numpy())
    found = root(lambda z: np.exp(z / 2) * (M.numpy() @ np.exp(z)) - 1, start, tol=1e-12)
    assert abs(found.fun).max() < 1e-10
    assert_close(power_weights(M, 2.0), torch.from_numpy(np.exp(found.x)), rtol=1e-8, atol=0)
    a = cp.Variable(4)
    solved(cp.Minimize(cp.quad_form(a, M.numpy()) / 2 - cp.sum(cp.log(a))))
    assert_close(power_weights(M), torch.from_numpy(a.value), rtol=1e-5, atol=0)


# -------------------------------------------------------------------------------- corners, for each


@every
def test_one_task(name):
    w = ON_M[name](tensor([4.0]))
    expected = {"nash": 0.5, "fairgrad": 4 ** (-2 / 3)}.get(name, 1.0)
    assert_close(w, tensor(expected))
    assert ON_M[name](torch.zeros(1, 1)).tolist() == [1]


@every
def test_all_gradients_zero(name):
    w = ON_M[name](torch.zeros(3, 3, dtype=F64))
    assert_close(w, torch.full((3,), 1.0 if name in ("nash", "fairgrad") else 1 / 3, dtype=F64))


@every
def test_one_gradient_zero(name):
    J = jacobian(4, common=1.0)
    J[2] = 0
    M = J @ J.T
    others = torch.tensor([0, 1, 3])
    w = ON_M[name](M)
    alone = ON_M[name](M[others][:, others])
    if name in SIMPLEX:
        assert w.tolist() == [0, 0, 1, 0]  # all others gain, so this one is the worst
    elif name in ("nash", "fairgrad"):
        assert_close(w[others], alone)
        assert_close(w[2], alone.mean())
    else:
        assert_close(w, torch.full((4,), 0.25, dtype=F64))


def test_cagrad_with_a_zero_gradient_and_a_loser():
    """The worst gain is that of a task that loses, not the zero of the zero gradient."""
    J = tensor([4.0, 0.0], [0.0, 0.0], [-1.0, 0.1])
    assert cagrad_weights(J @ J.T, 0.4).tolist() == [0, 0, 1]


@every
@pytest.mark.parametrize("T", [2, 3, 11, 40])
def test_equal_gradients_share(name, T):
    w = ON_M[name](torch.full((T, T), 2.0, dtype=F64))
    assert_close(w, w.mean().expand(T), rtol=1e-5, atol=0)  # the noise of a condition of 1e9
    one = torch.ones((), dtype=F64)
    if name == "nash":
        # a direction of length sqrt(T)
        assert_close(w.sum(), one * (T / 2) ** 0.5, rtol=1e-8, atol=0)
    elif name != "fairgrad":
        assert_close(w.sum(), one)


@every
def test_opposite_gradients(name):
    M = tensor([1.0, -1.0], [-1.0, 1.0])
    w = ON_M[name](M)
    assert_close(w[0], w[1], rtol=1e-6, atol=0)
    assert w @ M @ w < 1e-8  # no direction
    assert w.max() < {"nash": 4e4, "fairgrad": 2e6}.get(name, 1.1)  # 1e-9 ** (-alpha / (1 + alpha))


@every
def test_three_tasks_at_a_stationary_point(name):
    J = jacobian(3)
    J = J - J.mean(0)
    w = ON_M[name](J @ J.T)
    assert torch.isfinite(w).all()
    if name not in ("cagrad",):
        assert (w @ J).norm() < 1e-3 * J.norm()


@every
@pytest.mark.parametrize("T, d", [(3, 1), (3, 2), (11, 4), (40, 15), (64, 63)])
def test_more_tasks_than_parameters(name, T, d):
    J = jacobian(T, d)
    M = J @ J.T
    w = ON_M[name](M)
    assert torch.isfinite(w).all() and (w >= 0).all()
    if name == "min norm":
        assert simplex_kkt(M, w) < 1e-7
    if name in ("upgrad", "dual projection"):
        assert (M @ w).min() > -1e-6 * M.diagonal().max() * w.max()


@every
@pytest.mark.parametrize("T", [3, 40])
def test_float32_noise_in_a_singular_gramian(name, T):
    J = jacobian(T, max(1, T // 2)).float()
    w = ON_M[name]((J @ J.T).double())
    assert torch.isfinite(w).all() and (w >= 0).all()


@every
@pytest.mark.parametrize("T", [3, 11, 40])
def test_duplicates_share_and_permutation_permutes(name, T):
    J = conflicting(T)[torch.arange(T) // 2]
    w = ON_M[name](J @ J.T)
    pairs = w[: 2 * (T // 2)].view(-1, 2)
    assert_close(pairs[:, 0], pairs[:, 1], rtol=1e-5, atol=1e-6)
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    regular = conflicting(T, 1)
    M = regular @ regular.T
    assert_close(ON_M[name](M[order][:, order]), ON_M[name](M)[order], rtol=1e-9, atol=1e-12)


@every
@pytest.mark.parametrize("scale", [1e-20, 1e-10, 1e10, 1e20])
@pytest.mark.parametrize("T", [3, 40])
def test_one_scale_for_all(name, scale, T):
    J = conflicting(T)
    M = J @ J.T
    power = {"nash": -0.5, "fairgrad": -2 / 3}.get(name, 0)
    assert_close(
        ON_M[name](scale * M), scale**power * ON_M[name](M), rtol=1e-9, atol=1e-12 * scale**power
    )


@every
@pytest.mark.parametrize("scale", [1e-10, 1e10])
@pytest.mark.parametrize("T", [2, 3, 11, 40])
def test_one_gradient_of_another_scale(name, scale, T):
    J = conflicting(T)
    J[0] *= scale
    M = J @ J.T
    w = ON_M[name](M)
    length = M.diagonal().sqrt()
    assert torch.isfinite(w).all() and (w >= 0).all()
    if name == "min norm":
        assert simplex_kkt(M, w) < 1e-12
    if name == "nash":
        assert_close(M @ w * w, torch.ones(T, dtype=F64), rtol=1e-6, atol=0)
    if name == "upgrad":
        assert ((M @ w) / length).min() > -1e-12 * (w * length).max()


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_power_over_twenty_orders(alpha):
    lengths = torch.logspace(-10, 10, 11, dtype=F64)
    J = torch.linalg.qr(jacobian(11, 30).T)[0].T * lengths[:, None]
    expected = lengths ** (-2 * alpha / (1 + alpha))
    assert_close(
        power_weights(J @ J.T, alpha) / expected, torch.ones(11, dtype=F64), rtol=1e-5, atol=0
    )


@every
def test_dtype_and_no_graph(name):
    J = conflicting(5).requires_grad_()
    M = J @ J.T
    w = ON_M[name](M)
    assert w.dtype == F64 and not w.requires_grad
    assert ON_M[name](M.float()).dtype == torch.float32
    assert_close(ON_M[name](M.float()).double(), w, rtol=1e-3, atol=1e-4)
    before = M.detach().clone()
    ON_M[name](M)
    assert torch.equal(M, before)


def test_dual_cone_leaves_u_alone():
    U = torch.eye(3, dtype=F64)
    M = conflicting(3)
    dual_cone_weights(M @ M.T, U)
    assert torch.equal(U, torch.eye(3, dtype=F64))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 10), st.integers(0, 10**6), st.data())
def test_anything_is_answered_and_feasible(T, d, seed, data):
    """Zeros, duplicates, opposites and scales, mixed."""
    J = torch.randn(T, d, generator=torch.Generator().manual_seed(seed), dtype=F64)
    kinds = data.draw(st.lists(st.sampled_from(KINDS), min_size=T, max_size=T))
    for t, kind in enumerate(kinds):
        if kind == "zero":
            J[t] = 0
        elif kind == "copy":
            J[t] = J[t - 1]
        elif kind == "negate":
            J[t] = -J[t - 1]
        elif kind != "keep":
            J[t] *= float(kind)
    assert_answered_and_feasible(J)


def assert_answered_and_feasible(J):
    """Weights of every solver; where lengths differ by 1e12 or more, more than a Gramian in float64
    has digits for, CAGrad's may say that it did not converge."""
    M = J @ J.T
    lengths = J.norm(dim=1)
    lengths = lengths[lengths > 0]
    is_beyond_float64 = len(lengths) > 0 and lengths.max() > 1e12 * lengths.min()
    for name, solve in ON_M.items():
        try:
            w = solve(M)
        except RuntimeError as error:
            assert is_beyond_float64 and "cagrad_weights did not converge" in str(error), name
            continue
        assert torch.isfinite(w).all() and (w >= 0).all(), name
        if name in SIMPLEX:
            assert abs(w.sum() - 1) < 1e-12


def test_cagrad_on_lengths_that_differ_by_sixteen_orders_says_so():
    """Found by hypothesis: an error in words, no wrong weights."""
    J = torch.randn(8, 3, generator=torch.Generator().manual_seed(11687), dtype=F64)
    J *= torch.tensor([1.0, 1e8, 1.0, 1.0, 1e8, 1e8, 1e8, 1e-8], dtype=F64)[:, None]
    assert_answered_and_feasible(J)


# ------------------------------------------------------------------------------------------- errors


@every
def test_bad_matrices(name):
    is_dual_cone = "dual" in name or name == "upgrad"
    bad_matrices = [
        (torch.zeros(2, 3), "square"),
        (torch.zeros(0, 0), "square"),
        (torch.zeros(2), "square"),
        (tensor([1.0, float("nan")], [0.0, 1.0]), "finite"),
        (tensor([float("inf")]).view(1, 1), "finite"),
        (tensor([-1.0, 0.0], [0.0, 1.0]), "negative"),
    ]
    for bad, words in bad_matrices:
        with pytest.raises(ValueError, match=words):
            if is_dual_cone:
                dual_cone_weights(bad, torch.zeros(1, 2))
            else:
                ON_M[name](bad)


def test_what_is_no_gramian_is_an_error():
    for solve in (
        power_weights,
        lambda M: cagrad_weights(M, 0.4),
        lambda M: dual_cone_weights(M, torch.eye(2)),
    ):
        with pytest.raises(ValueError, match="Gramian"):
            solve(tensor([1.0, -2.0], [-2.0, 1.0]))


def test_bad_arguments():
    M = torch.eye(2, dtype=F64)
    for c in (-0.1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="c must"):
            cagrad_weights(M, c)
    for alpha in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="alpha must"):
            power_weights(M, alpha)
    for U in (torch.zeros(1, 3), torch.zeros(2), tensor([float("nan"), 0.0]).view(1, 2)):
        with pytest.raises(ValueError, match="U must"):
            dual_cone_weights(M, U)


def test_no_silent_fallback(monkeypatch):
    """If the inner solvers return nonsense, the residual shows it, with the condition number."""
    J = conflicting(5)
    M = J @ J.T
    monkeypatch.setattr(solvers, "_pivot", lambda A, B, support: np.ones_like(B))
    assert simplex_kkt(M, min_norm_weights(M)) < 1e-13  # the second method takes over
    monkeypatch.setattr(solvers, "_active_set", lambda A, b: np.ones_like(b))
    monkeypatch.setattr(solvers, "_newton", lambda C, s, beta: 2 * s)
    monkeypatch.setattr(solvers, "_ball_pivot", lambda ball: (np.ones_like(ball.e), 0.0))
    for solve in ON_M.values():
        with pytest.raises(RuntimeError, match=r"residual .*e.*condition"):
            solve(M)


def test_cagrad_second_method(monkeypatch):
    for M in gramians(7):
        expected = cagrad_weights(M, 0.4)
        with monkeypatch.context() as patch:
            patch.setattr(solvers, "_ball_pivot", lambda ball: (np.ones_like(ball.e), 0.0))
            assert_close(cagrad_weights(M, 0.4), expected, rtol=1e-8, atol=1e-10)

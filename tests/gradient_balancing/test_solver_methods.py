"""What MGDA, CAGrad, Nash-MTL, FairGrad and UPGrad have in common."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dbmtl.gradient_balancing.cagrad import CAGrad
from dbmtl.gradient_balancing.fairgrad import FairGrad
from dbmtl.gradient_balancing.mgda import MGDA
from dbmtl.gradient_balancing.nash_mtl import NashMTL
from dbmtl.gradient_balancing.upgrad import UPGrad

ALL = [MGDA(), MGDA("l2"), MGDA("loss"), MGDA("loss+"), CAGrad(), NashMTL(), FairGrad(), UPGrad()]
named = pytest.mark.parametrize("method", ALL, ids=repr)


@named
def test_solver_methods_with_one_task(method, float64):
    w = method(float64([25.0]), float64(3.0))
    assert w.shape == (1,) and w > 0 and w.isfinite()


@named
def test_solver_methods_with_zero_gradients(method, draw):
    for tasks in (1, 3):
        w = method(torch.zeros(tasks, tasks, dtype=torch.float64), torch.ones(tasks))
        assert w.shape == (tasks,) and w.isfinite().all()
    G = draw(3, 6)
    G[1] = 0
    assert method(G @ G.T, torch.ones(3)).isfinite().all()


@named
def test_solver_methods_follow_a_permutation_of_tasks(method, draw):
    G = draw(5, 12)
    losses = torch.arange(1.0, 6.0, dtype=torch.float64)
    order = torch.tensor([3, 0, 4, 2, 1])
    expected = method(G @ G.T, losses)[order]
    assert_close(method(G[order] @ G[order].T, losses[order]), expected, rtol=1e-7, atol=1e-9)


@named
def test_solver_methods_harm_no_task(method, draw, direction):
    G = draw(4, 30, seed=3)
    d = direction(method, G, torch.arange(1.0, 5.0, dtype=torch.float64))
    if isinstance(method, CAGrad):
        assert d @ G.mean(0) > 0
    else:
        assert (G @ d).min() > -1e-9


@named
def test_solver_methods_evaluate_their_repr(method):
    assert repr(eval(repr(method))) == repr(method)


@named
def test_solver_methods_in_single_precision(method, draw):
    G = draw(4, 30)
    losses = torch.arange(1.0, 5.0)
    w = method((G @ G.T).float(), losses)
    assert w.dtype == torch.float32
    assert_close(w.double(), method(G @ G.T, losses.double()), rtol=1e-4, atol=1e-6)


@named
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_solver_methods_survive_what_gradients_can_be(method, data, draw):
    tasks = data.draw(st.integers(1, 6))
    dims = data.draw(st.integers(1, 8))
    rows = draw(tasks, dims, seed=data.draw(st.integers(0, 10_000)))
    for row in range(tasks):
        kind = data.draw(st.sampled_from(["as it is", "zero", "copy", "opposite"]))
        if kind != "as it is":
            rows[row] = {"zero": 0, "copy": 1, "opposite": -1}[kind] * rows[0]
    powers = data.draw(st.lists(st.integers(-8, 8), min_size=tasks, max_size=tasks))
    rows *= 10.0 ** torch.tensor(powers)[:, None]
    try:
        w = method(rows @ rows.T, torch.ones(tasks, dtype=torch.float64))
    except RuntimeError as error:  # products that float64 has no digits for: an error in words
        assert max(powers) - min(powers) >= 12 and "cagrad_weights did not converge" in str(error)
        return
    assert w.shape == (tasks,) and w.isfinite().all() and (w >= 0).all()

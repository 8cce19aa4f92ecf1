"""MoCo: its formula written a second time, the projection by SciPy, memory, refusals."""

import copy
import math

import numpy
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from dbmtl.core.balancer import Balancer
from dbmtl.gradient_balancing.moco import MoCo, move_lambda, track
from dbmtl.loss_balancing.log import Identity, Log

BAD = [
    ("b", 0.0),
    ("b", 1.5),
    ("b", "b"),
    ("b_decay", -1.0),
    ("b_decay", math.inf),
    ("c", -0.1),
    ("c", math.inf),
    ("c_decay", -1.0),
    ("c_decay", math.inf),
    ("rho", -1.0),
    ("rho", math.inf),
    ("eps", 0.0),
    ("eps", math.inf),
    ("projection", "softmin"),
]


def moco_by_formula(G, losses, b, b_decay, c, c_decay, rho, normalize, simplex):
    """The method with whole matrices, in NumPy; the projection by SciPy."""
    T, d = G.shape[1:]
    Y = numpy.zeros((T, d))
    lam = numpy.full(T, 1 / T)
    for k in range(1, len(G) + 1):
        new = G[k - 1]
        if normalize:
            lengths = numpy.linalg.norm(new, axis=1, keepdims=True)
            new = new / (lengths + 1e-8) * losses[k - 1][:, None]
        Y = Y - b / k**b_decay * (Y - new)
        v = lam - c / k**c_decay * ((Y @ Y.T + rho * numpy.eye(T)) @ lam)
        if simplex:
            lam = minimize(
                lambda w, v=v: ((w - v) ** 2).sum(),
                lam,
                bounds=[(0, 1)] * T,
                constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1}],
                options={"ftol": 1e-15, "maxiter": 300},
            ).x
        else:
            lam = numpy.exp(v) / numpy.exp(v).sum()
    return Y.T @ lam, lam


@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "schedule", [(0.5, 0.5, 0.1, 0.5, 0.0), (0.99, 0.0, 0.05, 0.0, 0.3), (0.3, 0.2, 0.02, 0.7, 2)]
)
def test_moco_is_its_formula(schedule, normalize, simplex, jacobians, task_rows):
    b, b_decay, c, c_decay, rho = schedule
    G = jacobians(3)[:, 0]
    losses = torch.rand(5, 3, dtype=torch.float64) + 0.5
    method = MoCo(b, b_decay, c, c_decay, rho, normalize, "simplex" if simplex else "softmax")
    for J, values in zip(G, losses, strict=True):
        direction = method(task_rows(J, 5), values, [0, 1])
    expected, lam = moco_by_formula(
        G.numpy(), losses.numpy(), b, b_decay, c, c_decay, rho, normalize, simplex
    )
    tolerance = 1e-6 if simplex else 1e-12
    assert_close(torch.cat(direction), torch.tensor(expected), rtol=0, atol=10 * tolerance)
    assert_close(method.memory["lambda"], torch.tensor(lam), rtol=0, atol=tolerance)


def test_moco_b_weighs_the_new_gradient():
    method = MoCo(b=0.9, b_decay=0.0, normalize=False)
    for g in (10.0, 20.0):
        direction = method([[torch.tensor([g])]], torch.ones(1))
    assert_close(direction, [torch.tensor([0.1 * 9.0 + 0.9 * 20.0])])


def test_moco_memory_fades_where_no_gradient_comes_and_counts_in_the_weights():
    method = MoCo(b=0.5, b_decay=0.0, normalize=False, c=0.01, c_decay=0.0)
    first = torch.tensor([[4.0, 8.0], [0.0, 2.0]])
    method([list(row.split(1)) for row in first], torch.ones(2), [3, 1])
    before = method.memory["lambda"]
    direction = method([[torch.tensor([4.0])], [torch.tensor([0.0])]], torch.ones(2), [3])
    expected = {3: torch.tensor([[3.0], [0.0]]), 1: torch.tensor([[2.0], [0.5]])}
    assert_close(method.memory["Y"], expected)
    C = torch.tensor([[13.0, 1.0], [1.0, 0.25]]).double()
    assert_close(method.memory["lambda"], (before - 0.01 * C @ before).softmax(0))
    assert_close(direction, [3 * method.memory["lambda"][:1].float()])
    assert method.positions() == {1, 3}


def test_moco_projected_onto_the_simplex_ends_at_the_shortest_vector(task_rows, float64):
    J = float64([1.0, 0.0], [0.0, 3.0])
    method = MoCo(normalize=False, projection="simplex", b=1.0, b_decay=0.0, c_decay=0.0)
    for _ in range(300):
        direction = method(task_rows(J), torch.ones(2).double())
    assert_close(direction, [float64(0.9, 0.3)])
    assert_close(method.memory["lambda"], float64(0.9, 0.1))


def test_moco_direction_does_not_see_the_scale_of_gradients_but_that_of_losses(
    jacobians, task_rows
):
    J = jacobians(3, 1)[:, 0][0]
    losses = torch.tensor([0.3, 2.0, 9.0]).double()
    plain = MoCo(eps=1e-30)(task_rows(J), losses)
    scaled = J * torch.tensor([[1e8], [1e-8], [3.0]]).double()
    assert_close(MoCo(eps=1e-30)(task_rows(scaled), losses), plain)
    assert (MoCo()(task_rows(J), 2 * losses)[0] - plain[0]).abs().max() > 0.1


def test_moco_keeps_one_copy_and_leaves_gradients_and_old_memory_alone(jacobians, task_rows):
    method = MoCo()
    rows = task_rows(jacobians(3)[:, 0][0], 5)
    given = copy.deepcopy(rows)
    direction = method(rows, torch.ones(3).double(), [0, 1])
    remembered = method.memory["Y"]
    before = copy.deepcopy(remembered)
    for _ in range(2):
        direction = method(rows, torch.ones(3).double(), [0, 1])
    assert_close(remembered, before, rtol=0, atol=0)
    Y = method.memory["Y"].values()
    assert rows[0][0].equal(given[0][0])
    assert sum(y.numel() for y in Y) == 36
    direction[0].zero_()
    assert all(y.abs().sum() > 0 for y in Y)


@pytest.mark.parametrize("projection", ["softmax", "simplex"])
@pytest.mark.parametrize("size", [1e20, 1e30])
def test_moco_goes_on_after_one_enormous_loss(projection, size):
    theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    balancer = Balancer(Identity(), MoCo(projection=projection), shared=[theta], num_tasks=2)
    for shock in (0.0, size, 0.0, 0.0, 0.0):
        theta.grad = None
        balancer.backward([theta[0] + shock, theta.square().sum()])
        assert theta.grad.isfinite().all() and theta.grad.norm() < 10
        lam = balancer.aggregator.memory["lambda"]
        assert lam.isfinite().all()
        assert_close(lam.sum(), torch.tensor(1.0).double())
    assert lam.tolist() == [0, 1]
    assert balancer.nonfinite.tolist() == [0, 0]


@pytest.mark.parametrize("projection", ["softmax", "simplex"])
def test_moco_refused_steps_change_nothing(projection, jacobians, task_rows):
    method = MoCo(projection=projection, normalize=False)
    losses = torch.ones(2).double()
    for J in jacobians(2, 3)[:, 0]:
        method(task_rows(J, 5), losses, [4, 1])
    before = copy.deepcopy(method.memory)
    huge = torch.full((2, 12), 1e160, dtype=torch.float64)
    answer = method(task_rows(huge, 5), losses, [4, 7])
    assert answer.isnan().all()  # lengths that float64 cannot hold
    assert list(method.memory["Y"]) == list(before["Y"])
    assert_close(method.memory, before, rtol=0, atol=0)
    infinite = torch.full((2, 2), math.inf).double()
    with pytest.raises(FloatingPointError, match="cannot move"):
        move_lambda(losses / 2, infinite, 0.1, projection=projection)


def test_moco_refuses_a_negative_loss_where_it_is_a_length(jacobians, task_rows):
    rows = task_rows(jacobians(2)[:, 0][0])
    method = MoCo()
    method(rows, torch.ones(2).double())
    before = copy.deepcopy(method.memory)
    losses = torch.tensor([1.0, -0.5]).double()
    with pytest.raises(ValueError, match=r"normalize=True.*negative; the losses are \[1.0, -0.5\]"):
        method(rows, losses)
    assert_close(method.memory, before, rtol=0, atol=0)
    assert MoCo(normalize=False)(rows, losses)[0].isfinite().all()


def test_moco_zero_gradient_of_an_enormous_loss():
    rows = [[torch.zeros(2)], [torch.ones(2)]]
    assert MoCo()(rows, torch.tensor([1e35, 1.0]))[0].isfinite().all()


def test_moco_half_precision_is_tracked_in_float32(task_rows):
    J = torch.tensor([[300.0, -400.0], [1.0, 0.0]], dtype=torch.float16)
    losses = torch.tensor([5.0, 1.0])
    [direction] = MoCo(b=1.0)(task_rows(J), losses)
    [expected] = MoCo(b=1.0)(task_rows(J.double()), losses.double())
    assert direction.dtype == torch.float32
    assert_close(direction.double(), expected, rtol=1e-5, atol=1e-5)


def test_move_lambda_by_hand():
    lam = torch.tensor([0.9, 0.1]).double()
    C = torch.tensor([[2.0, 1.0], [1.0, 4.0]]).double()
    expected = torch.tensor([0.9 - 0.19 + 0.16, 0.1 - 0.13 + 0.16]).double()
    assert_close(move_lambda(lam, C, 0.1), expected)
    expected = torch.tensor([0.62 + 0.21, -0.04 + 0.21]).double()
    assert_close(move_lambda(lam, C, 0.1, rho=1.0), expected)
    # (-1.0, -1.2) + 1.6
    assert_close(move_lambda(lam, C, 1.0), torch.tensor([0.6, 0.4]).double())
    # (-4.8, -3.8): a corner
    assert_close(move_lambda(lam, C, 3.0), torch.tensor([0.0, 1.0]).double())


def test_track_with_rate_one_forgets():
    y = torch.full((2, 3), 7.0)
    track(y, [torch.ones(3), torch.zeros(3)], torch.tensor([2.0, 5.0]), 1.0)
    assert_close(y, torch.tensor([[2.0] * 3, [0.0] * 3]))


def test_moco_shared_gradient_is_the_same_with_log(network, losses_of):
    nets = [network(), network()]
    for net, transform in zip(nets, (Identity(), Log()), strict=True):
        balancer = Balancer(transform, MoCo(eps=1e-30), shared=net["trunk"], num_tasks=2)
        for seed in range(3):
            net.zero_grad()
            balancer.backward(losses_of(net, seed))
    plain, logged = nets
    for p, q in zip(plain["trunk"].parameters(), logged["trunk"].parameters(), strict=True):
        assert_close(p.grad, q.grad, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(plain["a"].weight.grad, logged["a"].weight.grad)


@pytest.mark.parametrize("name, value", BAD)
def test_moco_names_a_bad_value(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        MoCo(**{name: value})
    assert str(value) in str(caught.value)

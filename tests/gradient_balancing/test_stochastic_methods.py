"""MoCo, ExcessMTL, SDMGrad and MoDo: hand numbers, formulas written a second time, edges."""

import copy
import math

import numpy
import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from dbmtl.core.aggregator import GradientAggregator
from dbmtl.core.balancer import Balancer
from dbmtl.core.gramian import gramian
from dbmtl.gradient_balancing.moco import ExcessMTL, MoCo, excess_risk, move_lambda, track
from dbmtl.gradient_balancing.sdmgrad import MoDo, SDMGrad, descend_on_simplex, unit_scale
from dbmtl.loss_balancing.log import Identity, Log

METHODS = [
    lambda: MoCo(),
    lambda: MoCo(normalize=False, projection="simplex", rho=0.2, c=0.02, b=0.9, b_decay=0.0, c_decay=0.0),
    lambda: ExcessMTL(), lambda: ExcessMTL(step_size=1.0, warmup=3),
    lambda: SDMGrad(), lambda: SDMGrad(lr=0.02, eps=0.0), lambda: MoDo(), lambda: MoDo(gamma=0.05),
]  # fmt: skip
IDS = [
    "moco",
    "moco-paper",
    "excess",
    "excess-warm",
    "sdmgrad",
    "sdmgrad-slow",
    "modo",
    "modo-fast",
]
everything = pytest.mark.parametrize("make", METHODS, ids=IDS)


def jacobians(T, steps=5, d=12, seed=0, batches=2):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(steps, batches, T, d, generator=generator, dtype=torch.float64)


def rows_of(J, cut=None):
    return [[row] if cut is None else [row[:cut].clone(), row[cut:].clone()] for row in J]


def call(method, J, losses, cut=None):
    """One step; `J` holds two batches' Jacobians, of which the methods with memory read the first."""
    if method.num_batches == 3:
        return method(J[0] @ J[1].mT, losses)
    found = method(rows_of(J[0], cut), losses, None if cut is None else [0, 1])
    return torch.cat(found) if isinstance(found, list) else found


# ------------------------------------------------------------------------------------------------------------- MoCo


def moco_by_formula(G, losses, b, b_decay, c, c_decay, rho, normalize, simplex):
    """The method with whole matrices, in NumPy; the projection by SciPy."""
    T, d = G.shape[1:]
    Y, lam = numpy.zeros((T, d)), numpy.full(T, 1 / T)
    for k in range(1, len(G) + 1):
        new = G[k - 1]
        if normalize:
            new = (
                new
                / (numpy.linalg.norm(new, axis=1, keepdims=True) + 1e-8)
                * losses[k - 1][:, None]
            )
        Y = Y - b / k**b_decay * (Y - new)
        v = lam - c / k**c_decay * ((Y @ Y.T + rho * numpy.eye(T)) @ lam)
        if simplex:
            sums = {"type": "eq", "fun": lambda w: w.sum() - 1}
            options = {
                "bounds": [(0, 1)] * T,
                "constraints": [sums],
                "options": {"ftol": 1e-15, "maxiter": 300},
            }
            lam = minimize(lambda w, v=v: ((w - v) ** 2).sum(), lam, **options).x
        else:
            lam = numpy.exp(v) / numpy.exp(v).sum()
    return Y.T @ lam, lam


@pytest.mark.parametrize("simplex", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize(
    "schedule", [(0.5, 0.5, 0.1, 0.5, 0.0), (0.99, 0.0, 0.05, 0.0, 0.3), (0.3, 0.2, 0.02, 0.7, 2)]
)
def test_moco_is_its_formula(schedule, normalize, simplex):
    b, b_decay, c, c_decay, rho = schedule
    G, losses = jacobians(3)[:, 0], torch.rand(5, 3, dtype=torch.float64) + 0.5
    method = MoCo(b, b_decay, c, c_decay, rho, normalize, "simplex" if simplex else "softmax")
    for J, values in zip(G, losses, strict=True):
        direction = method(rows_of(J, 5), values, [0, 1])
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
    assert_close(
        method.memory["Y"], {3: torch.tensor([[3.0], [0.0]]), 1: torch.tensor([[2.0], [0.5]])}
    )
    C = torch.tensor([[13.0, 1.0], [1.0, 0.25]]).double()
    assert_close(method.memory["lambda"], (before - 0.01 * C @ before).softmax(0))
    assert_close(direction, [3 * method.memory["lambda"][:1].float()])
    assert method.positions() == {1, 3}


def test_moco_projected_onto_the_simplex_ends_at_the_shortest_vector():
    J = torch.tensor([[1.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    method = MoCo(normalize=False, projection="simplex", b=1.0, b_decay=0.0, c_decay=0.0)
    for _ in range(300):
        direction = method(rows_of(J), torch.ones(2).double())
    assert_close(direction, [torch.tensor([0.9, 0.3], dtype=torch.float64)])
    assert_close(method.memory["lambda"], torch.tensor([0.9, 0.1], dtype=torch.float64))


def test_moco_direction_does_not_see_the_scale_of_gradients_but_that_of_losses():
    J, losses = jacobians(3, 1)[0, 0], torch.tensor([0.3, 2.0, 9.0]).double()
    plain = MoCo(eps=1e-30)(rows_of(J), losses)
    assert_close(
        MoCo(eps=1e-30)(rows_of(J * torch.tensor([[1e8], [1e-8], [3.0]]).double()), losses), plain
    )
    assert (MoCo()(rows_of(J), 2 * losses)[0] - plain[0]).abs().max() > 0.1


def test_moco_keeps_one_copy_in_place_and_leaves_the_gradients_alone():
    method, rows = MoCo(), rows_of(jacobians(3)[0, 0], 5)
    kept = copy.deepcopy(rows)
    direction = method(rows, torch.ones(3).double(), [0, 1])
    places = [y.data_ptr() for y in method.memory["Y"].values()]
    for _ in range(2):
        direction = method(rows, torch.ones(3).double(), [0, 1])
    assert [y.data_ptr() for y in method.memory["Y"].values()] == places
    assert (
        rows[0][0].equal(kept[0][0]) and sum(y.numel() for y in method.memory["Y"].values()) == 36
    )
    direction[0].zero_()
    assert all(y.abs().sum() > 0 for y in method.memory["Y"].values())


@pytest.mark.parametrize("projection", ["softmax", "simplex"])
@pytest.mark.parametrize("size", [1e20, 1e30])
def test_moco_goes_on_after_one_enormous_loss(projection, size):
    theta = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    balancer = Balancer(Identity(), MoCo(projection=projection), shared=[theta], num_tasks=2)
    for shock in (0.0, size, 0.0, 0.0, 0.0):
        theta.grad = None
        balancer.backward([theta[0] + shock, theta.square().sum()])
        assert theta.grad.isfinite().all() and theta.grad.norm() < 10
        assert balancer.aggregator.memory["lambda"].isfinite().all()
        assert_close(balancer.aggregator.memory["lambda"].sum(), torch.tensor(1.0).double())
    assert balancer.aggregator.memory["lambda"].tolist() == [0, 1]
    assert balancer.skipped.tolist() == [0, 0]


@pytest.mark.parametrize("projection", ["softmax", "simplex"])
def test_moco_refused_steps_change_nothing(projection):
    method, losses = MoCo(projection=projection, normalize=False), torch.ones(2).double()
    for J in jacobians(2, 3)[:, 0]:
        method(rows_of(J, 5), losses, [4, 1])
    before, huge = copy.deepcopy(method.memory), torch.full((2, 12), 1e160, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match="cannot move"):
        method(rows_of(huge, 5), losses, [4, 7])
    assert list(method.memory["Y"]) == list(before["Y"])
    assert_close(method.memory, before, rtol=0, atol=0)
    with pytest.raises(FloatingPointError, match="cannot move"):
        move_lambda(losses / 2, torch.full((2, 2), math.inf).double(), 0.1, projection=projection)


def test_moco_refuses_a_negative_loss_where_it_is_a_length():
    rows, method = rows_of(jacobians(2)[0, 0]), MoCo()
    method(rows, torch.ones(2).double())
    before = copy.deepcopy(method.memory)
    with pytest.raises(ValueError, match=r"normalize=True.*negative; the losses are \[1.0, -0.5\]"):
        method(rows, torch.tensor([1.0, -0.5]).double())
    assert_close(method.memory, before, rtol=0, atol=0)
    assert MoCo(normalize=False)(rows, torch.tensor([1.0, -0.5]).double())[0].isfinite().all()


def test_moco_zero_gradient_of_an_enormous_loss():
    rows = [[torch.zeros(2)], [torch.ones(2)]]
    assert MoCo()(rows, torch.tensor([1e35, 1.0]))[0].isfinite().all()


def test_moco_half_precision_is_tracked_in_float32():
    rows = [
        [torch.tensor([300.0, -400.0], dtype=torch.float16)],
        [torch.tensor([1.0, 0.0], dtype=torch.float16)],
    ]
    direction = MoCo(b=1.0)(rows, torch.tensor([5.0, 1.0]))
    wide = MoCo(b=1.0)(
        [[g.double() for g in row] for row in rows], torch.tensor([5.0, 1.0]).double()
    )
    assert direction[0].dtype == torch.float32
    assert_close(direction[0].double(), wide[0], rtol=1e-5, atol=1e-5)


def test_move_lambda_by_hand():
    lam, C = torch.tensor([0.9, 0.1]).double(), torch.tensor([[2.0, 1.0], [1.0, 4.0]]).double()
    assert_close(
        move_lambda(lam, C, 0.1), torch.tensor([0.9 - 0.19 + 0.16, 0.1 - 0.13 + 0.16]).double()
    )
    assert_close(
        move_lambda(lam, C, 0.1, rho=1.0), torch.tensor([0.62 + 0.21, -0.04 + 0.21]).double()
    )
    assert_close(move_lambda(lam, C, 1.0), torch.tensor([0.6, 0.4]).double())  # (-1.0, -1.2) + 1.6
    assert_close(
        move_lambda(lam, C, 3.0), torch.tensor([0.0, 1.0]).double()
    )  # (-4.8, -3.8): a corner


@pytest.mark.parametrize("cls", [MoCo, ExcessMTL])
def test_memory_of_another_shape_is_refused_before_anything_changes(cls):
    method, ones = cls(), torch.ones(2)
    method([[torch.ones(2), torch.ones(3)], [torch.ones(2), torch.ones(3)]], ones)
    kept = copy.deepcopy(method.memory)
    with pytest.raises(ValueError, match="position 1"):
        method([[torch.ones(2), torch.ones(4)], [torch.ones(2), torch.ones(4)]], ones)
    assert_close(method.memory, kept, rtol=0, atol=0)


def test_track_with_rate_one_forgets():
    y = torch.full((2, 3), 7.0)
    track(y, [torch.ones(3), torch.zeros(3)], torch.tensor([2.0, 5.0]), 1.0)
    assert_close(y, torch.tensor([[2.0] * 3, [0.0] * 3]))


# -------------------------------------------------------------------------------------------------------- ExcessMTL


def excess_by_formula(G, step_size):
    """The method step by step, with squares and normalized weights, in NumPy."""
    T = G.shape[1]
    squares, w, first = numpy.zeros(G.shape[1:]), numpy.ones(T), None
    for new in G:
        squares += new**2
        excess = (new**2 / numpy.sqrt(squares + 1e-7)).sum(1)
        if first is None:
            first = excess
        else:
            w = w * numpy.exp(step_size * excess / first)
            w = w / w.sum() * T
    return w


@pytest.mark.parametrize("T", [1, 2, 5])
@pytest.mark.parametrize("step_size", [0.01, 1.0])
def test_excess_weights_are_their_formula(T, step_size):
    G, method = jacobians(T)[:, 0], ExcessMTL(step_size)
    for J in G:
        w = method(rows_of(J, 5), torch.ones(T).double(), [0, 1])
    assert_close(w, torch.tensor(excess_by_formula(G.numpy(), step_size)), rtol=1e-10, atol=0)


def test_excess_first_step_is_equal_and_the_second_by_hand():
    method = ExcessMTL(step_size=2.0)
    assert_close(
        method([[torch.tensor([1.0])], [torch.tensor([1e3])]], torch.ones(2)), torch.ones(2)
    )
    w = method([[torch.tensor([1.0])], [torch.tensor([2e3])]], torch.ones(2))
    expected = 2 * torch.tensor([2 / math.sqrt(2), 2 * 4 / math.sqrt(5)]).softmax(0)
    assert_close(w, expected, rtol=1e-5, atol=0)


def test_excess_warmup_takes_the_mean_as_unit():
    G = torch.tensor([[1.0, 2.0], [3.0, 2.0], [0.5, 4.0], [1.0, 1.0]]).double()
    method = ExcessMTL(step_size=1.0, warmup=3)
    w = [method([[g[:1]], [g[1:]]], torch.ones(2).double()) for g in G]
    e = [G[k] ** 2 / (G[: k + 1] ** 2).sum(0).add(1e-7).sqrt() for k in range(4)]
    assert_close(w[:3], [torch.ones(2).double()] * 3)
    assert_close(w[3], 2 * (3 * e[3] / (e[0] + e[1] + e[2])).softmax(0))


def test_excess_of_a_task_that_starts_without_gradient():
    method = ExcessMTL(step_size=1.0)
    zero, one = torch.zeros(2), torch.ones(2)
    weights = [
        method([[one], [zero]], one),
        method([[zero], [one]], one),
        method([[one], [one]], one),
    ]
    assert_close(weights[0], torch.ones(2))
    # task 2 counts as 1 up to its first gradient
    assert_close(weights[1], 2 * torch.tensor([1.0, 2.0]).softmax(0))
    assert_close(
        weights[2], 2 * torch.tensor([1 + 0.5**0.5, 2 + 0.5**0.5]).softmax(0), atol=1e-6, rtol=0
    )


def test_excess_of_parameters_that_come_and_go():
    method, whole = ExcessMTL(step_size=1.0), ExcessMTL(step_size=1.0)
    a, b, zero = torch.tensor([2.0]), torch.tensor([-3.0]), torch.zeros(1)
    for row, where in (([a], [4]), ([a, b], [4, 2]), ([b], [2])):
        w = method([row, [2 * g for g in row]], torch.ones(2), where)
    for row in ([a, zero], [a, b], [zero, b]):
        expected = whole([row, [2 * g for g in row]], torch.ones(2), [4, 2])
    assert torch.equal(w, expected)
    assert_close(method.memory["roots"][2], torch.tensor([[3.0], [6.0]]) * 2**0.5)


def test_excess_does_not_overflow():
    roots, huge = torch.zeros(1, 2), torch.tensor([1e30, -1e30])
    assert_close(excess_risk(roots, [huge]).float(), torch.tensor([2e30]))
    method = ExcessMTL(step_size=1.0)
    for g in (1e-25, 1e30, 1.0, 1e30):
        w = method(
            [[torch.tensor([g])], [torch.tensor([1.0])], [torch.tensor([0.0])]], torch.ones(3)
        )
    assert w.isfinite().all() and abs(w.sum().item() - 3) < 1e-5


# --------------------------------------------------------------------------------------------------- three batches


def test_sdmgrad_finds_the_optimum_where_the_rate_is_small():
    J, pull = jacobians(4)[0, 0] / 3, 0.3
    C = J @ J.T
    w = descend_on_simplex(
        C, torch.full((4,), 0.25).double(), pull, lr=0.2, momentum=0.5, steps=1500
    )

    def length(w):
        return ((w + pull / 4) @ C.numpy() @ (w + pull / 4)).item() / 2

    sums = {"type": "eq", "fun": lambda w: w.sum() - 1}
    best = minimize(
        length,
        numpy.full(4, 0.25),
        bounds=[(0, 1)] * 4,
        constraints=[sums],
        options={"ftol": 1e-14},
    ).x
    assert_close(w, torch.tensor(best), atol=1e-5, rtol=0)


def test_sdmgrad_momentum_by_hand():
    C = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
    w = descend_on_simplex(C, torch.tensor([0.5, 0.5]).double(), 0.0, lr=0.1, momentum=0.5, steps=2)
    # first velocity (0.5, 1), w (0.525, 0.475); then (0.25, 0.5) + (0.525, 0.95)
    assert_close(w, torch.tensor([0.525 - 0.0775 + 0.11125, 0.475 - 0.145 + 0.11125]).double())


@pytest.mark.parametrize("pull", [0.0, 0.3, 7.0])
def test_sdmgrad_direction_is_the_weighted_sum_plus_the_mean(pull):
    (first, second, third), method = jacobians(3, batches=3)[0], SDMGrad(pull=pull)
    weights = method(first @ second.T, torch.ones(3).double())
    w = method.memory["w"]
    assert_close(third.T @ weights, (third.T @ w + pull * third.mean(0)) / (1 + pull))
    assert_close(weights.sum(), torch.tensor(1.0).double())


def test_sdmgrad_reads_rows_from_the_first_batch():
    C = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double()
    assert SDMGrad(lr=0.1)(C, torch.ones(2))[0] < 0.5 < SDMGrad(lr=0.1)(C.T, torch.ones(2))[0]
    assert MoDo()(C, torch.ones(2))[0] < 0.5 < MoDo()(C.T, torch.ones(2))[0]


def test_sdmgrad_unit_scale():
    assert_close(
        unit_scale(torch.tensor([[9.0, 1.0], [2.0, -5.0]])),
        torch.tensor([[9.0, 1.0], [2.0, -5.0]]) / 2.25,
    )
    C = torch.diag(torch.tensor([1.0, 2.0, 4.0])).double()
    for eps, same in ((0.0, True), (1e-8, False)):
        alike = torch.allclose(
            *(SDMGrad(lr=0.1, eps=eps)(scale * C, torch.ones(3)) for scale in (1, 1e-9))
        )
        assert alike == same


def test_sdmgrad_starts_from_the_last_weights():
    C = torch.diag(torch.tensor([1.0, 4.0, 9.0])).double()
    method = SDMGrad(lr=0.1, steps=3, normalize=False)
    for _ in range(4):
        method(C, torch.ones(3))
    start = torch.full((3,), 1 / 3).double()
    for _ in range(4):
        start = descend_on_simplex(C, start, 0.3, 0.1, 0.5, 3)
    assert_close(method.memory["w"], start)


def test_modo_by_hand():
    method, C = MoDo(gamma=0.1, rho=1.0), torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
    assert_close(
        method(C, torch.ones(2).double()), torch.tensor([0.45, 0.55]).double()
    )  # (0.3, 0.4) + 0.15
    expected = torch.tensor([0.45 * 0.6, 0.55 * 0.8]).double()
    assert_close(method(C, torch.ones(2).double()), expected + (1 - expected.sum()) / 2)


def test_modo_two_batches_are_right_on_average_and_one_is_not():
    truth = torch.tensor([[1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0]], dtype=torch.float64)
    generator, level = torch.Generator().manual_seed(3), {}
    for double in (True, False):
        method, path = MoDo(gamma=0.01, rho=0.0), []
        for _ in range(1500):
            first, second = (
                truth
                + torch.tensor([[1.0], [0.1]]) * torch.randn(2, 2, 4, generator=generator).double()
            )
            path.append(method(first @ (second if double else first).T, torch.ones(2))[0])
        level[double] = torch.stack(path[300:]).mean().item()
    assert abs(level[True] - 0.8) < 0.04
    assert abs(level[False] - 4.04 / 9.04) < 0.04  # diagonal 1 + 4 * 1^2 and 4 + 4 * 0.1^2


@pytest.mark.parametrize("cls, default", [(SDMGrad, "sum"), (MoDo, "mean")])
def test_three_batch_methods_say_what_heads_get(cls, default):
    assert cls().heads == default and cls.num_batches == 3 and not cls.weights_heads
    assert [cls(heads=h).heads for h in ("sum", "mean", "last")] == ["sum", "mean", "last"]


# ---------------------------------------------------------------------------------------------------- all of them


@everything
@pytest.mark.parametrize("T", [1, 2, 5])
def test_stochastic_methods_permute_with_the_tasks(make, T):
    order = torch.randperm(T, generator=torch.Generator().manual_seed(1))
    plain, permuted, losses = make(), make(), torch.rand(T).double() + 0.5
    for J in jacobians(T):
        a, b = call(plain, J, losses), call(permuted, J[:, order], losses[order])
        assert a.isfinite().all()
        assert_close(
            b,
            a if isinstance(plain, GradientAggregator) and len(a) != T else a[order],
            rtol=1e-9,
            atol=1e-9,
        )


@everything
def test_stochastic_methods_do_not_see_how_parameters_are_cut(make):
    whole, cut, losses = make(), make(), torch.ones(3).double()
    for J in jacobians(3):
        assert_close(call(whole, J, losses), call(cut, J, losses, cut=5), rtol=1e-10, atol=1e-12)


@everything
def test_stochastic_methods_in_float32(make):
    wide, narrow = make(), make()
    for J in jacobians(3):
        a, b = call(wide, J, torch.ones(3).double()), call(narrow, J.float(), torch.ones(3))
        assert b.dtype == torch.float32
        assert_close(b.double(), a, rtol=1e-4, atol=1e-4)


@everything
def test_stochastic_methods_go_on_from_a_saved_state(make):
    method, other, steps, losses = make(), make(), jacobians(3), torch.ones(3).double()
    for J in steps[:3]:
        call(method, J, losses)
    state = copy.deepcopy(method.state_dict())
    call(method, steps[3], losses)
    other.load_state_dict(state)
    call(other, steps[3], losses)
    a, b, fresh = (call(m, steps[4], losses) for m in (method, other, make()))
    assert torch.equal(a, b)
    assert isinstance(method, SDMGrad) or not torch.equal(
        a, fresh
    )  # 20 steps may forget where they came from


@everything
@pytest.mark.parametrize("T", [1, 2, 11])
def test_stochastic_methods_survive_zero_equal_and_opposite_gradients(make, T):
    row = torch.randn(8, generator=torch.Generator().manual_seed(0)).double()
    signs = torch.where(torch.arange(T) % 2 == 0, 1.0, -1.0).double()[:, None]
    for J in (torch.zeros(T, 8).double(), row.expand(T, 8), signs * row):
        method = make()
        for pair in [torch.stack([J, J])] * 3 + [
            torch.stack([J, -J]),
            torch.zeros(2, T, 8).double(),
        ]:
            found = call(method, pair, torch.ones(T).double())
            assert found.isfinite().all()
            if method.num_batches == 3:
                assert (found >= 0).all()
                assert_close(found.sum(), torch.tensor(1.0).double())


@everything
@pytest.mark.parametrize("scale", [1e-10, 1e10])
def test_stochastic_methods_survive_extreme_scales(make, scale):
    for dtype in (torch.float32, torch.float64):
        method = make()
        for J in jacobians(3).to(dtype) * scale:
            assert call(method, J, torch.tensor([1.0, scale, 1.0], dtype=dtype)).isfinite().all()


@everything
def test_stochastic_methods_repr(make):
    method = make()
    names = {"MoCo": MoCo, "ExcessMTL": ExcessMTL, "SDMGrad": SDMGrad, "MoDo": MoDo}
    again = eval(repr(method), names)
    assert repr(again) == repr(method) and "=" in repr(method)
    public = [{k: v for k, v in vars(m).items() if not k.startswith("_")} for m in (again, method)]
    assert public[0] == public[1]


BAD = {
    MoCo: {"b": (0.0, 1.5, "b"), "b_decay": (-1.0, math.inf), "c": (-0.1, math.inf), "c_decay": (-1.0, math.inf),
           "rho": (-1.0, math.inf), "eps": (0.0, math.inf), "projection": ("softmin",)},
    ExcessMTL: {"step_size": (-1.0, math.inf), "warmup": (0, 1.5, math.inf), "eps": (0.0, math.inf)},
    SDMGrad: {"pull": (-0.1, math.inf), "lr": (0.0, math.inf), "momentum": (1.0, math.nan),
              "steps": (0, math.inf, 2.5, "20"), "eps": (-1.0, math.inf), "heads": ("first",)},
    MoDo: {"gamma": (-1.0, math.nan, math.inf), "rho": (-1.0, math.inf), "heads": (None,)},
}  # fmt: skip
BAD = [
    (cls, name, value)
    for cls, names in BAD.items()
    for name, values in names.items()
    for value in values
]


@pytest.mark.parametrize("cls, name, value", BAD)
def test_stochastic_methods_name_a_bad_value(cls, name, value):
    with pytest.raises(ValueError, match=name) as caught:
        cls(**{name: value})
    assert str(value) in str(caught.value)


# --------------------------------------------------------------------------------------------- through the balancer


def network():
    torch.manual_seed(0)
    return torch.nn.ModuleDict(
        {"trunk": torch.nn.Linear(3, 4), "a": torch.nn.Linear(4, 1), "b": torch.nn.Linear(4, 1)}
    ).double()


def losses_of(net, seed):
    x = torch.randn(6, 3, generator=torch.Generator().manual_seed(seed)).double()
    z = net["trunk"](x).tanh()
    return [(net["a"](z) - 1).square().mean(), (3 * net["b"](z) + 2).square().mean()]


def rows_through(net, seed):
    return [
        list(torch.autograd.grad(loss, net["trunk"].parameters(), retain_graph=True))
        for loss in losses_of(net, seed)
    ]


@pytest.mark.parametrize("heads", ["sum", "mean", "last"])
@pytest.mark.parametrize("cls", [SDMGrad, MoDo])
def test_three_batches_in_one_backward(cls, heads):
    net, first, second, third = network(), *(rows_through(network(), seed) for seed in (1, 2, 3))
    balancer = Balancer(Identity(), cls(heads=heads), shared=net["trunk"], num_tasks=2)
    balancer.backward(*(losses_of(net, seed) for seed in (1, 2, 3)))
    C = torch.stack(
        [
            torch.stack([sum((x * y).sum() for x, y in zip(a, b, strict=True)) for b in second])
            for a in first
        ]
    )
    w = cls()(C, torch.ones(2).double())
    assert_close(balancer.weights.double(), w)
    for p, a, b in zip(net["trunk"].parameters(), *third, strict=True):
        assert_close(p.grad, w[0] * a + w[1] * b)
    plain = network()
    for seed in (3,) if heads == "last" else (1, 2, 3):
        (sum(losses_of(plain, seed)) / (3 if heads == "mean" else 1)).backward()
    for name in "ab":
        assert_close(
            [p.grad for p in net[name].parameters()], [p.grad for p in plain[name].parameters()]
        )


def test_moco_shared_gradient_is_the_same_with_log():
    nets = [network(), network()]
    for net, transform in zip(nets, (Identity(), Log()), strict=True):
        balancer = Balancer(transform, MoCo(eps=1e-30), shared=net["trunk"], num_tasks=2)
        for seed in range(3):
            net.zero_grad()
            balancer.backward(losses_of(net, seed))
    plain, logged = ([p.grad for p in net["trunk"].parameters()] for net in nets)
    assert_close(plain, logged, rtol=1e-10, atol=1e-12)
    assert not torch.allclose(*(net["a"].weight.grad for net in nets))


@pytest.mark.parametrize("weights_heads", [True, False])
def test_excess_weights_reach_the_heads(weights_heads):
    net = network()
    balancer = Balancer(
        Identity(), ExcessMTL(1.0, weights_heads=weights_heads), shared=net["trunk"], num_tasks=2
    )
    for seed in (1, 2):
        net.zero_grad()
        balancer.backward(losses_of(net, seed))
    weights, plain = balancer.weights, network()
    assert abs(weights[0] - 1) > 0.01
    (losses_of(plain, 2)[1] * (weights[1] if weights_heads else 1)).backward()
    assert_close(net["b"].weight.grad, plain["b"].weight.grad)


def test_cross_gramian_of_the_library_has_the_first_batch_in_its_rows():
    first, second = rows_of(jacobians(3)[0, 0], 5), rows_of(jacobians(3)[0, 1], 5)
    assert_close(gramian(first, second), jacobians(3)[0, 0] @ jacobians(3)[0, 1].T)
    assert not torch.allclose(gramian(first, second), gramian(second, first))

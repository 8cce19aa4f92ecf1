"""What holds for every method on any gradients: zeros, copies, opposites, sums of others, scales of 1e-10 to 1e10."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dbmtl import make_balancer, method_names
from dbmtl.registry import hyperparameters

F64 = torch.float64


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, database=None)


@st.composite
def jacobians(
    draw,
    most=6,
    kinds=("own", "own", "integers", "zero", "copy", "opposite", "sum", "nearly"),
    far=10,
):
    """T rows of d numbers, each multiplied by a power of ten."""
    T, d = draw(st.integers(1, most)), draw(st.sampled_from([1, 2, 3, 5, 8, 20]))
    g, rows = torch.Generator().manual_seed(draw(st.integers(0, 999))), []
    for t in range(T):
        kind, own = draw(st.sampled_from(kinds)), torch.randn(d, generator=g, dtype=F64)
        other = rows[draw(st.integers(0, t - 1))] if t else own
        row = {"own": own, "integers": (2 * own).round(), "zero": 0 * own, "copy": other, "opposite": -other,
               "sum": sum(rows, 0 * own), "nearly": other + 1e-9 * own}[kind]  # fmt: skip
        rows.append(row)
    return torch.stack([10.0 ** draw(st.integers(-far, far)) * row for row in rows])


values = st.lists(st.integers(-10, 10).map(lambda e: 10.0**e), min_size=6, max_size=6)


class Lines(nn.Module):
    """Losses of given values whose gradients are the rows of a Jacobian."""

    def __init__(self, J, values):
        super().__init__()
        self.J, self.values = J, torch.tensor(values[: len(J)]).to(J)
        self.trunk = nn.ParameterList([nn.Parameter(torch.ones(J.shape[1], dtype=J.dtype))])

    def losses(self, z):
        dot = self.J @ z[0]
        return list(dot - dot.detach() + self.values)

    def step(self, balancer):
        zs = [
            self.trunk[0][None] * 1 for _ in range(3 if balancer.aggregator.num_batches == 3 else 1)
        ]
        self.trunk[0].grad = None
        balancer.backward(
            *map(self.losses, zs), **({"features": zs[0]} if balancer.level == "features" else {})
        )
        balancer.after_step(0.9 * self.values)
        return self.trunk[0].grad


def direction(J, name, **hyper):
    model = Lines(J, [1.0] * 6)
    balancer = make_balancer(name, shared=model.trunk, num_tasks=len(J), **hyper)
    return model.step(balancer), balancer.weights


def reads_gradients(name):
    balancer = make_balancer(name, shared=[nn.Parameter(torch.zeros(1))], num_tasks=1)
    return balancer.aggregator.needs_gradients


READERS = [name for name in method_names() if reads_gradients(name)]
OTHERS = [name for name in method_names() if not reads_gradients(name) and name != "IGBv2"]


@pytest.mark.parametrize("name", READERS)
@examples(15)
@given(jacobians(), values, st.sampled_from([F64, torch.float32]))
def test_no_error_and_nothing_but_finite_numbers(name, J, losses, dtype):
    check_finite(name, J.to(dtype), losses)


@pytest.mark.parametrize("name", OTHERS)
@examples(10)
@given(jacobians(far=3), values)
def test_nothing_but_finite_numbers_from_the_loss_axis(name, J, losses):
    check_finite(name, J, losses)


def check_finite(name, J, losses):
    model = Lines(J, losses)
    hyper = {"seed": 1} if "seed" in hyperparameters(name) else {}
    balancer = make_balancer(name, shared=model.trunk, num_tasks=len(J), **hyper)
    for _ in range(2):
        g = model.step(balancer)
        assert g.isfinite().all() and g.dtype == J.dtype
        assert balancer.weights is None or balancer.weights.isfinite().all()
        assert all(p.grad.isfinite().all() for p in balancer.parameters())
        for p in balancer.parameters():
            p.grad = None


@examples(60)
@given(jacobians(), st.sampled_from(["none", "l2"]))
def test_mgda_is_in_the_hull_and_no_vertex_is_nearer(J, normalize):
    found, weights = direction(J, "MGDA", normalize=normalize)
    n = (
        torch.where(J.norm(dim=1) > 0, J.norm(dim=1), 1)
        if normalize == "l2"
        else torch.ones(len(J), dtype=F64)
    )
    w = weights * n
    assert w.min() >= 0 and abs(w.sum().item() - 1) < 1e-9
    rows = J / n[:, None]
    assert (found - w @ rows).norm() <= 1e-12 * (
        w @ rows.norm(dim=1)[:, None].expand_as(rows)
    ).norm() + 1e-300
    gap = found @ found - (rows @ found).min()
    assert gap <= 1e-6 * rows.norm(dim=1).min() * rows.norm(dim=1).max() + 1e-300


@examples(60)
@given(jacobians())
def test_upgrad_hurts_nobody(J):
    found, weights = direction(J, "UPGrad")
    lengths = J.norm(dim=1)
    assert weights.min() >= 1 / len(J) - 1e-12
    assert ((J @ found) >= -1e-7 * lengths * (weights @ lengths)).all()


@examples(60)
@given(jacobians(), st.sampled_from([0.1, 0.5, 0.9, 2.0]))
def test_cagrad_serves_the_worst_off_best(J, c):
    """Inside the ball; and no direction of the ball can do better, by the value of some weights in the dual problem."""
    found, weights = direction(J, "CAGrad", c=c, rescale=0)
    mean, radius = J.mean(0), c * J.mean(0).norm()
    unit = J.norm(dim=1).max()
    assert (found - mean).norm() <= radius + 1e-7 * unit
    rest = (weights - 1 / len(J)).clamp(min=0)
    candidates = [
        direction(J, "MGDA")[1]
    ]  # the best where the hull holds zero: then our rest is another projection's
    if rest @ J.norm(dim=1) > 1e-9 * radius:
        candidates.append(rest / rest.sum())
    bound = min((w @ J) @ mean + radius * (w @ J).norm() for w in candidates)
    assert (J @ found).min() >= bound - 1e-6 * unit * (mean.norm() + radius) or len(candidates) == 1


@examples(60)
@given(jacobians(), st.sampled_from([0.5, 1.0, 2.0]))
def test_power_weights_solve_their_equation(J, alpha):
    """M a = a^(-1/alpha) in each task with a gradient; a singular Gramian gets a ridge of 1e-9 in its cosines."""
    _, a = direction(J, "FairGrad", alpha=alpha)
    assert (a > 0).all()
    M, length = J @ J.T, J.norm(dim=1)
    alive = length > 0
    if not alive.any():
        return
    goal = a ** (-1 / alpha)
    ridge = 1e-8 * length * (length @ a)  # what rounding and the ridge may add
    assert (((M @ a - goal).abs() <= 1e-6 * goal + ridge) | ~alive).all()


@examples(40)
@given(jacobians())
def test_nash_is_the_power_of_one(J):
    assert torch.equal(direction(J, "Nash-MTL")[1], direction(J, "FairGrad", alpha=1.0)[1])
    found, a = direction(J, "Nash-MTL", max_norm=None)
    clipped, _ = direction(J, "Nash-MTL")
    assert clipped.norm() <= 1 + 1e-6
    if found.norm() > 0:
        assert (clipped / clipped.norm() - found / found.norm()).norm() < 1e-9


@examples(40)
@given(jacobians(kinds=("own",), far=5))
def test_independent_gradients_are_met_as_the_names_say(J):
    """IMTL-G: equal projections; ConFIG: equal cosines, above 0, and its length; PCGrad of two: no conflict."""
    T, d = J.shape
    units = J / J.norm(dim=1, keepdim=True)
    if T > d or torch.linalg.cond(units) > 1e4:
        return
    impartial, _ = direction(J, "IMTL-G")
    projections = units @ impartial
    assert (projections - projections.mean()).abs().max() <= 1e-7 * impartial.norm() + 1e-300
    free, _ = direction(J, "ConFIG")
    assert (units @ free).min() > 0 and (units @ free / free.norm()).std(correction=0) < 1e-7
    assert abs((J @ free / free.norm()).sum() / free.norm() - 1) < 1e-9
    if T == 2:
        projected, _ = direction(J, "PCGrad", itself=False, eps=0.0)
        assert (units @ projected >= -1e-9 * J.norm(dim=1).max()).all()


@examples(40)
@given(jacobians(kinds=("own", "zero")))
def test_max_norm_gives_all_one_length(J):
    _, weights = (
        direction(J, "gradient-only", beta=0, eps=0.0)
        if (J.norm(dim=1) > 0).all()
        else (None, None)
    )
    if weights is not None:
        lengths = weights * J.norm(dim=1)
        assert (lengths / lengths.max() - 1).abs().max() < 1e-12


def test_cagrad_of_opposite_gradients_of_very_different_lengths():
    """Found by a longer search: nobody can do better than 0, and the length of g_w is nothing but rounding."""
    g = torch.Generator().manual_seed(35)
    one, two = (torch.randn(20, generator=g, dtype=F64) for _ in range(2))
    J = torch.stack([1e-9 * one, 1e-10 * (2 * two).round(), -one])
    found, weights = direction(J, "CAGrad", c=2.0, rescale=0)
    assert (found - J.mean(0)).norm() <= 2 * J.mean(0).norm() * (1 + 1e-6)
    assert (J @ found / J.norm(dim=1)).min() >= -1e-6 * J.mean(0).norm()

"""What holds for every method on any gradients: zeros, copies, opposites, sums of others, scales of
1e-10 to 1e10."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from dbmtl import make_balancer, method_names
from dbmtl.registry import hyperparameters

F64 = torch.float64
KINDS = ("own", "own", "integers", "zero", "copy", "opposite", "sum", "nearly")  # of rows


def examples(n):
    return settings(max_examples=n, deadline=None, derandomize=True, database=None)


def new_row(kind, rows, own, other):
    """A row of a Jacobian that has the rows `rows` already; `other` is one of these, if any."""
    if kind == "own":
        return own
    if kind == "integers":
        return (2 * own).round()
    if kind == "zero":
        return 0 * own
    if kind == "copy":
        return other
    if kind == "opposite":
        return -other
    if kind == "sum":
        return sum(rows, 0 * own)
    if kind == "nearly":
        return other + 1e-9 * own
    raise ValueError(kind)


@st.composite
def jacobians(draw, most=6, kinds=KINDS, far=10):
    """T rows of d numbers, each multiplied by a power of ten."""
    T = draw(st.integers(1, most))
    d = draw(st.sampled_from([1, 2, 3, 5, 8, 20]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 999)))
    rows = []
    for t in range(T):
        kind = draw(st.sampled_from(kinds))
        own = torch.randn(d, generator=generator, dtype=F64)
        other = rows[draw(st.integers(0, t - 1))] if t else own
        rows.append(new_row(kind, rows, own, other))
    return torch.stack([10.0 ** draw(st.integers(-far, far)) * row for row in rows])


values = st.lists(st.integers(-10, 10).map(lambda e: 10.0**e), min_size=6, max_size=6)


class Lines(nn.Module):
    """Losses of given values whose gradients are the rows of a Jacobian."""

    def __init__(self, J, values):
        super().__init__()
        self.J = J
        self.values = torch.tensor(values[: len(J)]).to(J)
        self.trunk = nn.ParameterList([nn.Parameter(torch.ones(J.shape[1], dtype=J.dtype))])

    def losses(self, z):
        dot = self.J @ z[0]
        return list(dot - dot.detach() + self.values)

    def step(self, balancer):
        """The shared gradient of one step, with features or three batches where they are asked."""
        zs = [self.trunk[0][None] * 1 for _ in range(balancer.aggregator.num_batches)]
        features = {"features": zs[0]} if balancer.level == "features" else {}
        self.trunk[0].grad = None
        balancer.backward(*map(self.losses, zs), **features)
        balancer.after_step(0.9 * self.values)
        return self.trunk[0].grad


def direction(J, name, **hyper):
    """The shared gradient and the weights of a method in its first step."""
    model = Lines(J, [1.0] * 6)
    balancer = make_balancer(name, shared=model.trunk, num_tasks=len(J), **hyper)
    return model.step(balancer), balancer.weights


def reads_gradients(name):
    balancer = make_balancer(name, shared=[nn.Parameter(torch.zeros(1))], num_tasks=1)
    return balancer.aggregator.needs_gradients


READERS = [name for name in method_names() if reads_gradients(name)]
OTHERS = [name for name in method_names() if not reads_gradients(name) and name != "IGBv2"]


@pytest.mark.full
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
        assert g.isfinite().all()
        assert g.dtype == J.dtype
        assert balancer.weights is None or balancer.weights.isfinite().all()
        assert all(p.grad.isfinite().all() for p in balancer.parameters())
        for p in balancer.parameters():
            p.grad = None


@examples(60)
@given(jacobians(), st.sampled_from(["none", "l2"]))
def test_mgda_is_in_the_hull_and_no_vertex_is_nearer(J, normalize):
    d, weights = direction(J, "MGDA", normalize=normalize)
    lengths = torch.ones(len(J), dtype=F64)
    if normalize == "l2":
        lengths = torch.where(J.norm(dim=1) > 0, J.norm(dim=1), 1)
    w = weights * lengths
    assert w.min() >= 0
    assert abs(w.sum().item() - 1) < 1e-9
    rows = J / lengths[:, None]
    largest_terms = (w @ rows.norm(dim=1)[:, None].expand_as(rows)).norm()
    assert (d - w @ rows).norm() <= 1e-12 * largest_terms + 1e-300
    gap = d @ d - (rows @ d).min()
    assert gap <= 1e-6 * rows.norm(dim=1).min() * rows.norm(dim=1).max() + 1e-300


@examples(60)
@given(jacobians())
def test_upgrad_hurts_nobody(J):
    d, weights = direction(J, "UPGrad")
    lengths = J.norm(dim=1)
    assert weights.min() >= 1 / len(J) - 1e-12
    assert ((J @ d) >= -1e-7 * lengths * (weights @ lengths)).all()


@examples(60)
@given(jacobians(), st.sampled_from([0.1, 0.5, 0.9, 2.0]))
def test_cagrad_serves_the_worst_off_best(J, c):
    """Inside the ball; and no direction of the ball can do better, by the value of some weights in
    the dual problem."""
    d, weights = direction(J, "CAGrad", c=c, rescale=0)
    mean = J.mean(0)
    radius = c * mean.norm()
    unit = J.norm(dim=1).max()
    assert (d - mean).norm() <= radius + 1e-7 * unit
    # the best where the hull holds zero: then what we add to the mean is another projection's
    candidates = [direction(J, "MGDA")[1]]
    added = (weights - 1 / len(J)).clamp(min=0)
    if added @ J.norm(dim=1) > 1e-9 * radius:
        candidates.append(added / added.sum())
    bound = min((w @ J) @ mean + radius * (w @ J).norm() for w in candidates)
    # a mean far shorter than its gradients is known to the square root of the Gramian's rounding
    slack = 1e-6 * unit * (mean.norm() + radius) + 1e-8 * unit**2
    assert (J @ d).min() >= bound - slack or len(candidates) == 1


@examples(60)
@given(jacobians(), st.sampled_from([0.5, 1.0, 2.0]))
def test_power_weights_solve_their_equation(J, alpha):
    """M a = a^(-1/alpha) in each task with a gradient; a singular Gramian gets a ridge of 1e-9 in
    its cosines."""
    _, a = direction(J, "FairGrad", alpha=alpha)
    assert (a > 0).all()
    M = J @ J.T
    length = J.norm(dim=1)
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
    whole, _ = direction(J, "Nash-MTL", max_norm=None)
    clipped, _ = direction(J, "Nash-MTL")
    assert clipped.norm() <= 1 + 1e-6
    if whole.norm() > 0:
        assert (clipped / clipped.norm() - whole / whole.norm()).norm() < 1e-9


@examples(40)
@given(jacobians(kinds=("own",), far=5))
def test_independent_gradients_are_met_as_the_names_say(J):
    """IMTL-G: equal projections; ConFIG: equal cosines, above 0, and its length; PCGrad of two: no
    conflict."""
    T, d = J.shape
    units = J / J.norm(dim=1, keepdim=True)
    if T > d or torch.linalg.cond(units) > 1e4:
        return
    impartial, _ = direction(J, "IMTL-G")
    projections = units @ impartial
    assert (projections - projections.mean()).abs().max() <= 1e-7 * impartial.norm() + 1e-300
    free, _ = direction(J, "ConFIG")
    cosines = units @ free / free.norm()
    assert (units @ free).min() > 0
    assert cosines.std(correction=0) < 1e-7
    assert abs((J @ free / free.norm()).sum() / free.norm() - 1) < 1e-9
    if T == 2:
        projected, _ = direction(J, "PCGrad", itself=False, eps=0.0)
        assert (units @ projected >= -1e-9 * J.norm(dim=1).max()).all()


@examples(40)
@given(jacobians(kinds=("own", "zero")))
def test_max_norm_gives_all_one_length(J):
    if (J.norm(dim=1) == 0).any():
        return
    _, weights = direction(J, "gradient-only", beta=0, eps=0.0)
    lengths = weights * J.norm(dim=1)
    assert (lengths / lengths.max() - 1).abs().max() < 1e-12


def test_cagrad_of_opposite_gradients_of_very_different_lengths():
    """Found by a longer search: nobody can do better than 0, and the length of g_w is nothing but
    rounding."""
    generator = torch.Generator().manual_seed(35)
    one = torch.randn(20, generator=generator, dtype=F64)
    two = torch.randn(20, generator=generator, dtype=F64)
    J = torch.stack([1e-9 * one, 1e-10 * (2 * two).round(), -one])
    d, _ = direction(J, "CAGrad", c=2.0, rescale=0)
    assert (d - J.mean(0)).norm() <= 2 * J.mean(0).norm() * (1 + 1e-6)
    assert (J @ d / J.norm(dim=1)).min() >= -1e-6 * J.mean(0).norm()

"""Side by side with TorchJD on random Jacobians: equal, or different in the way that the test
says."""

import math
from functools import cache

import pytest
import torch
import torchjd.aggregation as jd
import torchjd.scalarization as scalar
from torch import nn
from torch.testing import assert_close
from torchjd.linalg import QuadprogProjector

from dbmtl import make_balancer

F64 = torch.float64
SHAPES = [(2, 5), (3, 12), (5, 40), (11, 64)]
FLAT = [(3, 2), (6, 3), (11, 4)]  # more tasks than parameters: a singular Gramian
KINDS = ["random", "conflict", "scales"]

everywhere = pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape[0]}x{shape[1]}")
flat = pytest.mark.parametrize("shape", FLAT, ids=lambda shape: f"{shape[0]}x{shape[1]}")
kinds = pytest.mark.parametrize("kind", KINDS)


@cache
def jacobian(shape, kind="random", seed=0, dtype=F64):
    """Rows that are random, or oppose their mean, or differ in length by a factor of 100 from
    first to last."""
    T, d = shape
    J = torch.randn(T, d, generator=torch.Generator().manual_seed(1000 * seed + T), dtype=F64)
    if kind == "conflict":
        J = J - 0.8 * J.mean(0)
    if kind == "scales":
        J = J * torch.logspace(-1, 1, T, dtype=F64)[:, None]
    return J.to(dtype)


def several(shape, kind="random", steps=4):
    return [jacobian(shape, kind, seed) for seed in range(steps)]


class Ours:
    """A method, fed with Jacobians: what lands in `.grad`."""

    def __init__(self, name, J, **hyper):
        self.theta = nn.Parameter(torch.zeros(J.shape[1], dtype=J.dtype))
        self.balancer = make_balancer(name, shared=[self.theta], num_tasks=len(J), **hyper)
        self.balancer.transform.to(J.dtype)

    def losses(self, J, values=None):
        dot = J @ self.theta
        return dot + ((torch.ones_like(dot) if values is None else values) - dot).detach()

    def __call__(self, *Js, values=None):
        self.theta.grad = None
        self.balancer.backward(*(self.losses(J, values) for J in Js))
        return self.theta.grad


def direction(name, J, **hyper):
    return Ours(name, J, **hyper)(J)


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def in_order(monkeypatch):
    """TorchJD visits the other tasks in a random order: now from the first to the last."""
    monkeypatch.setattr(torch, "randperm", torch.arange)


def test_torchjd_has_what_is_compared_here():
    compared = {
        "AlignedMTL",
        "CAGrad",
        "ConFIG",
        "Constant",
        "ExcessMTL",
        "FairGrad",
        "GradDrop",
        "GradVac",
        "IMTLG",
        "MGDA",
        "Mean",
        "MoDoWeighting",
        "NashMTL",
        "PCGrad",
        "Random",
        "SDMGradWeighting",
        "Sum",
        "UPGrad",
    }
    scalarizers = {"DWA", "FAMO", "GeometricMean", "IMTLL", "Mean", "Random", "STCH", "Sum", "UW"}
    assert compared <= set(jd.__all__)
    assert scalarizers <= set(scalar.__all__)


# --------------------------------------------------------------------------- weights in closed form


@everywhere
@kinds
def test_torchjd_sum_and_mean(shape, kind):
    """EW sums; the mean is 1/T of it and has no name here: the learning rate does it."""
    J = jacobian(shape, kind)
    assert_close(direction("EW", J), jd.Sum()(J))
    assert_close(direction("EW", J), shape[0] * jd.Mean()(J))
    assert_close(direction("EW", J), jd.Constant(torch.ones(shape[0], dtype=F64))(J))


@everywhere
def test_torchjd_random_weights(shape):
    """The same softmax of the same normal numbers, if both streams have one seed."""
    J = jacobian(shape)
    ours = Ours("RLW", J, seed=11)
    torch.manual_seed(11)
    theirs = jd.Random()
    for J in several(shape):
        assert_close(ours(J), theirs(J))


@everywhere
@kinds
@pytest.mark.parametrize("scale", ["min", "median", "rmse"])
def test_torchjd_aligned(shape, kind, scale):
    """TorchJD takes the mean of the aligned gradients, we the sum as LibMTL does; `reduction`
    chooses."""
    J = jacobian(shape, kind)
    theirs = jd.AlignedMTL(scale_mode=scale)(J)
    mean = direction("Aligned-MTL", J, scale=scale, reduction="mean")
    total = direction("Aligned-MTL", J, scale=scale)
    assert_close(mean, theirs, rtol=1e-9, atol=1e-11)
    assert_close(total, shape[0] * theirs, rtol=1e-9, atol=1e-11)


@flat
def test_torchjd_aligned_with_more_tasks_than_parameters(shape):
    J = jacobian(shape)
    theirs = jd.AlignedMTL()(J)
    assert_close(direction("Aligned-MTL", J, reduction="mean"), theirs, rtol=1e-7, atol=1e-9)


@everywhere
@kinds
def test_torchjd_config(shape, kind):
    J = jacobian(shape, kind)
    assert_close(direction("ConFIG", J), jd.ConFIG()(J), rtol=1e-8, atol=1e-10)


@flat
def test_torchjd_config_with_more_tasks_than_parameters(shape):
    """The least squares solution of equal angles, in both."""
    J = jacobian(shape)
    assert_close(direction("ConFIG", J), jd.ConFIG()(J), rtol=1e-7, atol=1e-9)


def test_torchjd_config_with_a_zero_row():
    J = jacobian((4, 9)).clone()
    J[2] = 0
    assert_close(direction("ConFIG", J), jd.ConFIG()(J), rtol=1e-8, atol=1e-10)


@everywhere
@kinds
def test_torchjd_imtlg(shape, kind):
    J = jacobian(shape, kind)
    assert_close(direction("IMTL-G", J), jd.IMTLG()(J), rtol=1e-8, atol=1e-10)


@flat
def test_torchjd_imtlg_with_more_tasks_than_parameters(shape):
    """No direction but zero projects equally on all: ours is that one, TorchJD's the
    pseudoinverse's compromise."""
    J = jacobian(shape)
    ours = Ours("IMTL-G", J)
    theirs = jd.IMTLG()(J)
    assert ours(J).norm() < 1e-7 * J.norm()
    assert ours.balancer.weights.sum().item() == pytest.approx(1)
    projections = J @ theirs / J.norm(dim=1)
    assert projections.max() - projections.min() > 1e-2 * J.norm()


# ------------------------------------------------------------------------------------ random orders


@everywhere
@kinds
def test_torchjd_pcgrad(shape, kind, monkeypatch):
    """TorchJD follows the paper: no visit to oneself, no eps; LibMTL's are the defaults here."""
    in_order(monkeypatch)
    J = jacobian(shape, kind)
    ours = direction("PCGrad", J, order="fixed", itself=False, eps=0.0)
    assert_close(ours, jd.PCGrad()(J), rtol=1e-10, atol=1e-12)


@everywhere
@kinds
def test_torchjd_gradvac(shape, kind, monkeypatch):
    in_order(monkeypatch)
    Js = several(shape, kind, 6)
    ours = Ours("GradVac", Js[0], order="fixed", beta=0.3)
    theirs = jd.GradVac(beta=0.3)
    for J in Js:
        assert_close(ours(J), theirs(J), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    "name, hyper, aggregator", [("PCGrad", {"eps": 0.0}, jd.PCGrad), ("GradVac", {}, jd.GradVac)]
)
def test_torchjd_random_orders_do_not_matter_for_two_tasks(name, hyper, aggregator):
    ours = Ours(name, jacobian((2, 5)), **hyper)
    theirs = aggregator()
    for J in several((2, 5), "conflict", 6):
        assert_close(ours(J), theirs(J), rtol=1e-10, atol=1e-12)


@everywhere
@pytest.mark.parametrize("leak", [None, 0.3])
def test_torchjd_graddrop(shape, leak):
    """Equal draws where both draw float32: ours are always float32, TorchJD's have the type of the
    gradients."""
    J = jacobian(shape, dtype=torch.float32)
    ours = Ours("GradDrop", J, seed=3, **({} if leak is None else {"leak": leak}))
    torch.manual_seed(3)
    theirs = jd.GradDrop(leak=None if leak is None else torch.full((shape[0],), leak))
    for seed in range(4):
        J = jacobian(shape, "conflict", seed, torch.float32)
        assert_close(ours(J), theirs(J), rtol=1e-5, atol=1e-6)


# ------------------------------------------------------------------------------------------ solvers


@pytest.mark.parametrize("shape", SHAPES + FLAT, ids=lambda shape: f"{shape[0]}x{shape[1]}")
@kinds
def test_torchjd_mgda_is_never_shorter(shape, kind):
    """Frank-Wolfe stops after 100 steps; its point lies in the hull, so the gap bounds the
    distance."""
    J = jacobian(shape, kind)
    ours = direction("MGDA", J)
    theirs = jd.MGDA(epsilon=1e-9, max_iters=2000)(J)
    gap = (theirs @ theirs - ours @ ours).item()
    scale = (J @ J.T).diagonal().max().item()
    assert gap >= -1e-8 * scale
    assert ((ours - theirs) @ (ours - theirs)).item() <= gap + 1e-7 * scale
    assert (J @ ours).min() >= ours @ ours - 1e-7 * scale


@everywhere
@kinds
@pytest.mark.parametrize("c", [0.2, 0.5])
def test_torchjd_cagrad(shape, kind, c):
    """TorchJD has no division by 1 + c^2: that is rescale=0. Clarabel's weights are good to about
    1e-6."""
    J = jacobian(shape, kind)
    theirs = jd.CAGrad(c=c)(J)
    ours = direction("CAGrad", J, c=c, rescale=0)
    assert (ours - theirs).norm() < 3e-4 * ours.norm()
    assert (J @ ours).min() >= (J @ theirs).min() - 1e-3 * c * J.mean(0).norm() ** 2
    assert_close(direction("CAGrad", J, c=c) * (1 + c**2), ours)


def test_torchjd_cagrad_stops_at_a_pareto_point_and_ours_helps_who_can_be_helped():
    """Two opposite gradients and a third: nobody can do better than 0 for the worst-off, but the
    third can gain."""
    J = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=F64)
    assert_close(jd.CAGrad(c=1.5)(J), torch.zeros(2, dtype=F64))
    assert_close(direction("CAGrad", J, c=1.5, rescale=0), torch.tensor([0.0, 1 / 3], dtype=F64))


@pytest.mark.full
@everywhere
@kinds
@pytest.mark.filterwarnings("ignore:You are solving a parameterized problem that is not DPP")
@pytest.mark.filterwarnings("ignore:Solution may be inaccurate")
def test_torchjd_nash(shape, kind):
    """M a = 1/a exactly, against 20 convex steps of ECOS: the directions agree as well as TorchJD
    has converged."""
    pytest.importorskip("ecos")
    J = jacobian(shape, kind)
    M = J @ J.T

    def residual(a):
        return ((M @ a) * a - 1).abs().max().item()

    theirs = jd.NashMTL(n_tasks=shape[0], max_norm=0.0)  # no clip
    ours = Ours("Nash-MTL", J, max_norm=None)
    gradient = ours(J)
    expected = theirs(J)
    our_residual = residual(ours.balancer.weights)
    their_residual = residual(torch.as_tensor(theirs.weighting.prvs_alpha).double())
    assert our_residual < 1e-9
    assert our_residual < their_residual
    assert (gradient - expected).norm() <= max(1e-5, 2 * their_residual) * gradient.norm()
    clipped = direction("Nash-MTL", J)
    assert_close(clipped, gradient / gradient.norm(), rtol=1e-5, atol=1e-6)


@everywhere
@kinds
@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_torchjd_fairgrad(shape, kind, alpha):
    """scipy's least_squares starts from 1/T; where it has solved the equation, the weights are
    ours."""
    pytest.importorskip("scipy")
    J = jacobian(shape, kind)
    M = J @ J.T

    def residual(a):
        return ((M @ a) * a ** (1 / alpha) - 1).abs().max().item()

    theirs = jd.FairGradWeighting(alpha=alpha)(M)
    ours = Ours("FairGrad", J, alpha=alpha)
    gradient = ours(J)
    assert residual(ours.balancer.weights) < 1e-9
    assert residual(ours.balancer.weights) <= residual(theirs) + 1e-12
    if residual(theirs) < 1e-6:
        assert_close(gradient, theirs @ J, rtol=1e-4, atol=1e-5 * gradient.norm().item())
    assert residual(theirs) < 1e-6 or kind != "random"


@everywhere
@kinds
def test_torchjd_upgrad(shape, kind):
    """TorchJD adds 1e-4 of the trace to the diagonal before it projects; here that is `reg_eps`,
    by default 0."""
    J = jacobian(shape, kind)

    def worst_cosine(d):
        return ((J @ d) / J.norm(dim=1)).min() / d.norm()

    theirs = jd.UPGrad()(J)
    with_ridge = direction("UPGrad", J, reg_eps=1e-4)
    assert_close(with_ridge, theirs, rtol=1e-6, atol=1e-7 * theirs.norm().item())
    exact = direction("UPGrad", J)
    their_exact = jd.UPGrad(projector=QuadprogProjector(reg_eps=1e-12))(J)
    assert (exact - their_exact).norm() < 1e-6 * exact.norm()
    assert worst_cosine(exact) > -1e-9
    if kind == "scales":  # the ridge lets a gradient be hurt that is much shorter than others
        assert worst_cosine(theirs) < -0.01


@flat
def test_torchjd_upgrad_with_more_tasks_than_parameters(shape):
    J = jacobian(shape)
    ours = direction("UPGrad", J, reg_eps=1e-4)
    assert_close(ours, jd.UPGrad()(J), rtol=1e-6, atol=1e-7 * J.norm().item())


# ---------------------------------------------------------------------------- memory over the steps


@everywhere
@pytest.mark.parametrize("warmup", [1, 3])
def test_torchjd_excess(shape, warmup):
    """TorchJD's weights sum to 1, ours to T; its default step size is 1, LibMTL's 0.01."""
    Js = several(shape, steps=6)
    ours = Ours("ExcessMTL", Js[0], step_size=0.2, warmup=warmup)
    theirs = jd.ExcessMTL(robust_step_size=0.2, n_warmup_steps=warmup)
    for J in Js:
        assert_close(ours(J), shape[0] * theirs(J), rtol=1e-5, atol=1e-5)


@everywhere
def test_torchjd_excess_without_warmup_counts_the_raw_first_excess(shape):
    """TorchJD's default weighs its first step by the excess in its own unit; as in the official
    code. In ours the first excess is the unit, so the logarithms of the weights differ by
    step_size * (first excess), once and for all."""
    Js = several(shape, steps=5)
    ours = Ours("ExcessMTL", Js[0], step_size=0.01)
    theirs = jd.ExcessMTLWeighting(robust_step_size=0.01)
    first = (Js[0] ** 2 / (Js[0] ** 2 + 1e-7).sqrt()).sum(1)
    for J in Js:
        ours(J)
        shift = theirs(J).log() - ours.balancer.weights.log() - 0.01 * first
        assert_close(shift, shift.mean().expand_as(shift), rtol=0, atol=1e-6)


def three_batches(shape, steps=5):
    """The Jacobians of three batches, for each step."""
    for step in range(steps):
        yield [jacobian(shape, "random", 10 * step + batch) for batch in range(3)]


@everywhere
@pytest.mark.parametrize("hyper", [{}, {"lr": 0.3, "momentum": 0.2, "steps": 7, "pull": 1.0}])
def test_torchjd_sdmgrad(shape, hyper):
    """TorchJD's learning rate is 10, LibMTL's 5. The weights meet the third batch."""
    their_names = {"lr": "lr", "momentum": "momentum", "pull": "lambda_", "steps": "n_iter"}
    their_hyper = {"lr": 5.0} | {their_names[key]: value for key, value in hyper.items()}
    ours = Ours("SDMGrad", jacobian(shape), **hyper)
    theirs = jd.SDMGradWeighting(**their_hyper)
    for one, two, three in three_batches(shape):
        assert_close(ours(one, two, three), theirs(one @ two.T) @ three, rtol=1e-8, atol=1e-10)


@everywhere
@pytest.mark.parametrize("gamma, rho", [(0.1, 0.1), (0.01, 0.0)])
def test_torchjd_modo(shape, gamma, rho):
    """TorchJD's gamma is 0.1 by default, LibMTL's 0.001."""
    ours = Ours("MoDo", jacobian(shape), gamma=gamma, rho=rho)
    theirs = jd.MoDoWeighting(gamma=gamma, rho=rho)
    for one, two, three in three_batches(shape):
        assert_close(ours(one, two, three), theirs(one @ two.T) @ three, rtol=1e-8, atol=1e-10)


# -------------------------------------------------------------------------------------- scalarizers


def values_of(T, seed=0):
    return torch.rand(T, generator=torch.Generator().manual_seed(seed), dtype=F64) * 3 + 0.1


def side_by_side(ours, theirs, J, values):
    """Our shared gradient, and that of their scalar."""
    our_gradient = ours(J, values=values).clone()
    ours.theta.grad = None
    theirs(ours.losses(J, values)).backward()
    return our_gradient, ours.theta.grad


tasks = pytest.mark.parametrize("T", [1, 2, 3, 11])


@tasks
@pytest.mark.parametrize(
    "name, theirs, factor",
    [
        ("EW", scalar.Sum, lambda T: 1),
        ("EW", scalar.Mean, lambda T: T),
        ("GLS", scalar.GeometricMean, lambda T: 1),
    ],
)
def test_torchjd_scalarizers(name, theirs, factor, T):
    J = jacobian((T, 7))
    gradient, expected = side_by_side(Ours(name, J), theirs(), J, values_of(T))
    assert_close(gradient, factor(T) * expected, rtol=1e-10, atol=1e-12)


@tasks
def test_torchjd_scalarizer_random(T):
    ours = Ours("RLW", jacobian((T, 7)), seed=5)
    theirs = scalar.Random()
    torch.manual_seed(5)
    for seed in range(3):
        assert_close(*side_by_side(ours, theirs, jacobian((T, 7)), values_of(T, seed)))


@tasks
@pytest.mark.parametrize(
    "name, scalarizer, hyper", [("IMTL-L", scalar.IMTLL, {}), ("UW", scalar.UW, {"init": 0.0})]
)
def test_torchjd_learned_scales(name, scalarizer, hyper, T):
    """TorchJD's UW starts at 0, LibMTL's (and ours) at -0.5."""
    J = jacobian((T, 7))
    ours = Ours(name, J, **hyper)
    theirs = scalarizer(T).double()
    our_scales = list(ours.balancer.parameters())
    their_scales = list(theirs.parameters())
    sgd = torch.optim.SGD([*our_scales, *their_scales], 0.1)
    for seed in range(4):
        assert_close(*side_by_side(ours, theirs, J, values_of(T, seed)), rtol=1e-10, atol=1e-12)
        sgd.step()
        sgd.zero_grad()
    assert_close(our_scales, their_scales, rtol=1e-10, atol=1e-12)


@tasks
def test_torchjd_dwa(T):
    """The same ratios of epoch means; the first two epochs have equal weights of one."""
    J = jacobian((T, 7))
    ours = Ours("DWA", J, temperature=1.5)
    theirs = scalar.DWA(temperature=1.5)
    for epoch in range(4):
        for step in range(3):
            values = values_of(T, 10 * epoch + step)
            assert_close(*side_by_side(ours, theirs, J, values), rtol=1e-10, atol=1e-12)
        ours.balancer.end_epoch()
        theirs.step()


@tasks
def test_torchjd_famo(T):
    J = jacobian((T, 7))
    ours = Ours("FAMO", J)
    theirs = scalar.FAMO(T).double()
    for seed in range(6):
        assert_close(*side_by_side(ours, theirs, J, values_of(T, seed)), rtol=1e-7, atol=1e-9)
        again = values_of(T, 100 + seed)
        ours.balancer.after_step(again)
        theirs.update(again)


@tasks
@pytest.mark.parametrize("mu", [0.1, 1.0])
def test_torchjd_stch(T, mu):
    """TorchJD's is mu logsumexp(x / mu) of any x with weights of 1/T. LibMTL's, and ours, has T
    times that with weights of one, and x = log(l / nadir), nadir the mean losses of the epoch after
    the warm-up."""
    J = jacobian((T, 7))
    ours = Ours("STCH", J, mu=mu)
    nadir = values_of(T, 77)
    for _ in range(5):
        ours(J, values=nadir)
        ours.balancer.end_epoch()
    smooth = scalar.STCH(mu, weights=torch.ones(T, dtype=F64))

    def theirs(losses):
        return T * smooth((losses / nadir).log())

    for seed in range(3):
        gradient, expected = side_by_side(ours, theirs, J, values_of(T, seed))
        assert_close(gradient, expected, rtol=1e-8, atol=1e-10)
    if T > 1 and math.isclose(mu, 1.0):
        _, generic = side_by_side(ours, scalar.STCH(mu), J, values_of(T))
        assert cosine(generic, gradient) < 1 - 1e-6

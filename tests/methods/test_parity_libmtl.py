"""What LibMTL's own classes returned on random inputs (tests/parity/README.md): equal where LibMTL
computes, and no worse where it approximates."""

import json
import lzma
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl import make_balancer

VECTORS = Path(__file__).parents[1] / "parity" / "libmtl.json.xz"
CASES = json.loads(lzma.decompress(VECTORS.read_bytes()))
EQUAL = {  # LibMTL's name -> ours, and what its hyper-parameters are called here
    "EW": ("EW", lambda h: {}),
    "GLS": ("GLS", lambda h: {}),
    "UW": ("UW", lambda h: {}),
    "IMTL": ("IMTL", lambda h: {}),
    "PCGrad": ("PCGrad", lambda h: {"order": "fixed"}),
    "GradVac": ("GradVac", lambda h: {"order": "fixed", "beta": h["GradVac_beta"]}),
    "MoCo": (
        "MoCo",
        lambda h: {
            "b": h["MoCo_beta"],
            "b_decay": h["MoCo_beta_sigma"],
            "c": h["MoCo_gamma"],
            "c_decay": h["MoCo_gamma_sigma"],
            "rho": h["MoCo_rho"],
        },
    ),
    "Aligned_MTL": ("Aligned-MTL", lambda h: {}),
    "DB_MTL": ("DB-MTL", lambda h: {"beta": h["DB_beta"], "beta_decay": h["DB_beta_sigma"]}),
}
APPROXIMATE = {
    "MGDA": ("MGDA", lambda h: {"normalize": h["mgda_gn"]}),
    "CAGrad": ("CAGrad", lambda h: {"c": h["calpha"], "rescale": h["rescale"]}),
    "Nash_MTL": (
        "Nash-MTL",
        lambda h: {"max_norm": h["max_norm"], "update_every": h["update_weights_every"]},
    ),
    "FairGrad": ("FairGrad", lambda h: {"alpha": h["FairGrad_alpha"]}),
}
NAMES = EQUAL | APPROXIMATE
ROUTES = ["loop", "split", "batched", "accumulate"]


def title(number):
    case = CASES[number]
    hyper = ",".join(f"{key}={value}" for key, value in case["hyper"].items())
    return f"{case['method']}({hyper})-{case['K']}x{case['P']}"


def numbers(*methods):
    return [n for n, case in enumerate(CASES) if case["method"] in methods]


def each(*methods):
    return pytest.mark.parametrize("number", numbers(*methods), ids=title)


def column(case, key):
    return torch.tensor(case[key], dtype=torch.float64)


def losses_with(values, jacobian, theta):
    """Losses of these values whose gradients are the rows of the Jacobian."""
    dot = jacobian @ theta
    return dot + (values - dot).detach()


class Outcome(NamedTuple):
    """What a method did in the first steps of a case."""

    gradients: torch.Tensor  # [steps, P], shared
    weights: list  # of each step
    learned: list  # the learned scales at the end


@cache
def run(number, route="loop", steps=6, **other):
    """Our method on the inputs of a case; `other` are hyper-parameters to replace."""
    case = CASES[number]
    name, ours_of = NAMES[case["method"]]
    hyper = ours_of(case["hyper"]) | other
    if route != "accumulate":
        hyper["grads"] = route
    half = case["P"] // 2
    parts = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (half, case["P"] - half)]
    balancer = make_balancer(name, shared=parts, num_tasks=case["K"], **hyper)
    balancer.transform.double()
    learned = list(balancer.parameters())
    # the peer's IMTL scale never moved here
    sgd = torch.optim.SGD(learned, 0.1) if case["method"] == "UW" else None
    gradients = []
    weights = []
    for step in range(steps):
        values = column(case, "losses")[step]
        jacobian = column(case, "jacobians")[step]
        losses = losses_with(values, jacobian, torch.cat(parts)).unbind()
        if route == "accumulate":
            balancer.accumulate(losses, 3)
            balancer.backward()
        else:
            balancer.backward(losses)
        gradients.append(torch.cat([p.grad for p in parts]))
        weights.append(balancer.weights)
        for p in parts:
            p.grad = None
        if sgd:
            sgd.step()
            sgd.zero_grad()
    return Outcome(torch.stack(gradients), weights, [p.detach() for p in learned])


class Peer(NamedTuple):
    """One step of LibMTL."""

    M: torch.Tensor  # the Gramian [K, K]
    J: torch.Tensor  # the Jacobian [K, P]
    losses: torch.Tensor  # [K]
    weights: torch.Tensor  # [K]
    gradient: torch.Tensor  # the shared gradient [P]


def peer(number, step):
    case = CASES[number]
    J = column(case, "jacobians")[step]
    return Peer(
        M=J @ J.T,
        J=J,
        losses=column(case, "losses")[step],
        weights=column(case, "weights")[step],
        gradient=column(case, "shared_gradients")[step],
    )


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def test_libmtl_vectors_are_all_there():
    counts = {method: len(numbers(method)) for method in {case["method"] for case in CASES}}
    assert counts == dict.fromkeys(NAMES, 4) | {"DB_MTL": 12, "MGDA": 12, "CAGrad": 8}
    for case in CASES:
        for key in ("losses", "jacobians", "shared_gradients"):
            assert len(case[key]) == 6
    assert {case["K"] for case in CASES} == {2, 3, 5, 11}


# ---------------------------------------------------------------------------------- LibMTL computes


@each(*EQUAL)
def test_libmtl_shared_gradients(number):
    expected = column(CASES[number], "shared_gradients")
    assert_close(run(number).gradients, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.full
@pytest.mark.parametrize("route", ROUTES[1:])
@pytest.mark.parametrize("number", range(len(CASES)), ids=title)
def test_libmtl_shared_gradients_come_out_the_same_by_every_route(number, route):
    gradients = run(number, route, 3).gradients
    assert_close(gradients, run(number).gradients[:3], rtol=1e-10, atol=1e-11)


@each("UW")
def test_libmtl_uw_scales_after_six_steps(number):
    (s,) = run(number).learned
    assert_close(s, column(CASES[number], "final_state").flatten(), rtol=1e-10, atol=1e-10)


@each("IMTL")
def test_libmtl_imtl_scale_did_not_move(number):
    """So the vectors are IMTL-G's on the raw losses, and ours with a scale of zero, which is where
    it starts."""
    assert column(CASES[number], "final_state").abs().max() == 0
    (s,) = run(number).learned
    assert s.abs().max() == 0


def last_is_equal(number, **other):
    expected = column(CASES[number], "shared_gradients")[-1]
    return torch.allclose(run(number, **other).gradients[-1], expected, rtol=1e-4, atol=1e-8)


BREAKS = [
    ("DB_MTL", {"beta": 0.4}),
    ("DB_MTL", {"beta_decay": 0.6}),
    ("DB_MTL", {"alpha": "mean"}),
    ("UW", {"half": False}),
    ("UW", {"init": 0.0}),
    ("PCGrad", {"reduction": "mean"}),
    ("PCGrad", {"eps": 0.1}),
    ("PCGrad", {"order": "random", "seed": 5}),
    ("GradVac", {"beta": 0.4}),
    ("GradVac", {"update": "below"}),
    ("GradVac", {"group": "tensor"}),
    ("GradVac", {"order": "random", "seed": 5}),
    ("GradVac", {"eps": 0.1}),
    ("MoCo", {"b": 0.4}),
    ("MoCo", {"b_decay": 0.6}),
    ("MoCo", {"c": 0.2}),
    ("MoCo", {"c_decay": 0.0}),
    ("MoCo", {"rho": 0.5}),
    ("MoCo", {"normalize": False}),
    ("MoCo", {"projection": "simplex"}),
    ("Aligned_MTL", {"scale": "median"}),
    ("Aligned_MTL", {"reduction": "mean"}),
    ("CAGrad", {"c": 0.3}),
    ("CAGrad", {"rescale": 2}),
    ("CAGrad", {"times_tasks": True}),
    ("MGDA", {"normalize": "loss"}),
    ("MGDA", {"times_tasks": True}),
    ("Nash_MTL", {"max_norm": None}),
    ("FairGrad", {"alpha": 1.0}),
    ("FairGrad", {"max_norm": 1.0}),
]


@pytest.mark.parametrize("method, other", BREAKS, ids=[f"{m}-{next(iter(o))}" for m, o in BREAKS])
def test_libmtl_vectors_can_tell_the_difference(method, other):
    with_five_tasks = [n for n in numbers(method) if CASES[n]["K"] == 5]
    number = next(n for n in with_five_tasks if CASES[n]["hyper"].get("DB_beta", 0.5) == 0.5)
    expected = run(number).gradients[-1]
    changed = run(number, **other).gradients[-1]
    assert not torch.allclose(changed, expected, rtol=1e-3)
    if method in EQUAL:
        assert last_is_equal(number)
        assert not last_is_equal(number, **other)


# ------------------------------------------------------------------------------ LibMTL approximates


@each("MGDA")
def test_libmtl_mgda_is_never_shorter(number):
    """Both return the hull's point of the normalized gradients; ours satisfies the conditions of
    the shortest one."""
    ours = run(number)
    for step, d in enumerate(ours.gradients):
        M, J, losses, w, expected = peer(number, step)
        norms = M.diagonal().sqrt()
        scales = {"none": torch.ones_like(norms), "l2": norms, "loss+": losses * norms}
        n = scales[CASES[number]["hyper"]["mgda_gn"]]
        assert_close((w / n) @ J, expected, rtol=1e-12, atol=1e-12)  # what the peer solves
        convex = ours.weights[step] * n
        assert convex.min() >= 0
        assert convex.sum().item() == pytest.approx(1, abs=1e-12)
        assert_close(ours.weights[step] @ J, d, rtol=1e-10, atol=1e-12)
        length = d @ d
        assert length <= expected @ expected * (1 + 1e-12)
        assert ((J @ d) / n).min() >= length * (1 - 1e-9)  # no vertex of the hull lies nearer
        # the peer stops early, somewhere in the half space of the hull: the square root of the
        # gap bounds the distance
        assert (d - expected).norm() ** 2 <= (expected @ expected - length) + 1e-10 * length
        assert expected.norm() <= 1.2 * d.norm()


@each("CAGrad")
def test_libmtl_cagrad_agrees_to_slsqp(number):
    case = CASES[number]
    c = case["hyper"]["calpha"]
    scale = 1 + c**2 if case["hyper"]["rescale"] else 1
    ours = run(number)
    for step, gradient in enumerate(ours.gradients):
        _, J, _, w, expected = peer(number, step)
        assert (gradient - expected).norm() <= 2e-3 * expected.norm()
        added = ours.weights[step] * scale - 1 / case["K"]  # proportional to the weights of g_w
        assert added.min() > -1e-12
        v = added / added.sum()
        mean = J.mean(0)

        def objective(w, J=J, mean=mean):
            return (w @ J) @ mean + c * mean.norm() * (w @ J).norm()

        assert objective(v) <= objective(w) * (1 + 1e-12)
        d = gradient * scale
        assert (d - mean).norm() <= c * mean.norm() * (1 + 1e-9)
        # no gap: the max-min is reached
        assert (J @ d).min().item() == pytest.approx(objective(v).item(), rel=1e-8)


@each("Nash_MTL")
def test_libmtl_nash_solves_what_the_peer_approaches(number):
    tasks = CASES[number]["K"]
    ours = run(number)
    for step, gradient in enumerate(ours.gradients):
        M, J, _, w, expected = peer(number, step)

        def residual(a, M=M):
            return ((M @ a) * a - 1).abs().max().item()

        assert residual(ours.weights[step]) < 1e-9
        assert residual(ours.weights[step]) < residual(w)
        # |G'a|^2 = T before the clip
        assert gradient.norm().item() == pytest.approx(min(1.0, tasks**0.5), rel=1e-5)
        assert cosine(gradient, ours.weights[step] @ J) == pytest.approx(1, abs=1e-12)
        if residual(w) < 1e-3:
            assert_close(gradient, expected, rtol=1e-4, atol=1e-5)
        else:  # its 20 convex steps did not get there
            assert tasks == 11
    assert tasks == 11 or residual(w) < 1e-3


@each("FairGrad")
def test_libmtl_fairgrad_solves_the_same_equation(number):
    ours = run(number)
    for step, gradient in enumerate(ours.gradients):
        M, _, _, w, expected = peer(number, step)
        weights = ours.weights[step]
        assert_close(gradient, expected, rtol=1e-6, atol=1e-7)
        goal = weights ** (-1 / CASES[number]["hyper"]["FairGrad_alpha"])
        assert_close(M @ weights, goal, rtol=1e-10, atol=0)
        assert_close(weights, w, rtol=1e-5, atol=0)

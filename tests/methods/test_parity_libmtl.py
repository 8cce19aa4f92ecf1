"""What LibMTL's own classes returned on random inputs (tests/parity/README.md): equal where LibMTL computes, and no worse
where it approximates."""

import gzip
import json
from functools import cache
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl import make_balancer

CASES = json.loads(
    gzip.decompress((Path(__file__).parents[1] / "parity" / "libmtl.json.gz").read_bytes())
)
EQUAL = {  # LibMTL's name -> ours, and what its hyper-parameters are called here
    "EW": ("EW", lambda h: {}),
    "GLS": ("GLS", lambda h: {}),
    "UW": ("UW", lambda h: {}),
    "IMTL": ("IMTL", lambda h: {}),
    "PCGrad": ("PCGrad", lambda h: {"order": "fixed"}),
    "GradVac": ("GradVac", lambda h: {"order": "fixed", "beta": h["GradVac_beta"]}),
    "MoCo": ("MoCo", lambda h: {"b": h["MoCo_beta"], "b_decay": h["MoCo_beta_sigma"], "c": h["MoCo_gamma"],
                                "c_decay": h["MoCo_gamma_sigma"], "rho": h["MoCo_rho"]}),
    "Aligned_MTL": ("Aligned-MTL", lambda h: {}),
    "DB_MTL": ("DB-MTL", lambda h: {"beta": h["DB_beta"], "beta_decay": h["DB_beta_sigma"]}),
}  # fmt: skip
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


@cache
def run(number, route="loop", steps=6, **other):
    """Our shared gradients and weights in the first steps, and the learned scales at the end."""
    case = CASES[number]
    name, hyper = NAMES[case["method"]]
    parts = [
        nn.Parameter(torch.zeros(n, dtype=torch.float64))
        for n in (case["P"] // 2, case["P"] - case["P"] // 2)
    ]
    options = {} if route == "accumulate" else {"grads": route}
    ours = make_balancer(
        name, shared=parts, num_tasks=case["K"], **(hyper(case["hyper"]) | other), **options
    )
    ours.transform.double()
    learned = list(ours.parameters())
    sgd = (
        torch.optim.SGD(learned, 0.1) if case["method"] == "UW" else None
    )  # the peer's IMTL scale never moved here
    gradients, weights = [], []
    for values, jacobian in zip(
        column(case, "losses")[:steps], column(case, "jacobians")[:steps], strict=True
    ):
        losses = losses_with(values, jacobian, torch.cat(parts)).unbind()
        if route == "accumulate":
            ours.accumulate(losses, 3)
            ours.backward()
        else:
            ours.backward(losses)
        gradients.append(torch.cat([p.grad for p in parts]))
        weights.append(ours.weights)
        for p in parts:
            p.grad = None
        if sgd:
            sgd.step()
            sgd.zero_grad()
    return torch.stack(gradients), weights, [p.detach() for p in learned]


def peer(number, step):
    """The Gramian, the Jacobian, the losses, the peer's weights and its shared gradient in one step."""
    case = CASES[number]
    J, *others = (
        column(case, key)[step] for key in ("jacobians", "losses", "weights", "shared_gradients")
    )
    return J @ J.T, J, *others


def cosine(a, b):
    return (a @ b / a.norm() / b.norm()).item()


def test_libmtl_vectors_are_all_there():
    counts = {method: len(numbers(method)) for method in {case["method"] for case in CASES}}
    assert counts == dict.fromkeys(NAMES, 4) | {"DB_MTL": 12, "MGDA": 12, "CAGrad": 8}
    assert all(
        len(case[key]) == 6 for case in CASES for key in ("losses", "jacobians", "shared_gradients")
    )
    assert {case["K"] for case in CASES} == {2, 3, 5, 11}


# -------------------------------------------------------------------------------------------------- LibMTL computes


@each(*EQUAL)
def test_libmtl_shared_gradients(number):
    gradients, _, _ = run(number)
    assert_close(gradients, column(CASES[number], "shared_gradients"), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("route", ROUTES[1:])
@pytest.mark.parametrize("number", range(len(CASES)), ids=title)
def test_libmtl_shared_gradients_come_out_the_same_by_every_route(number, route):
    gradients, _, _ = run(number, route, 3)
    assert_close(gradients, run(number)[0][:3], rtol=1e-10, atol=1e-11)


@each("UW")
def test_libmtl_uw_scales_after_six_steps(number):
    (s,) = run(number)[2]
    assert_close(s, column(CASES[number], "final_state").flatten(), rtol=1e-10, atol=1e-10)


@each("IMTL")
def test_libmtl_imtl_scale_did_not_move(number):
    """So the vectors are IMTL-G's on the raw losses, and ours with a scale of zero, which is where it starts."""
    assert column(CASES[number], "final_state").abs().max() == 0
    (s,) = run(number)[2]
    assert s.abs().max() == 0


def last_is_equal(number, **other):
    gradients, _, _ = run(number, **other)
    return torch.allclose(
        gradients[-1], column(CASES[number], "shared_gradients")[-1], rtol=1e-4, atol=1e-8
    )


BREAKS = [
    ("DB_MTL", {"beta": 0.4}), ("DB_MTL", {"beta_decay": 0.6}), ("DB_MTL", {"alpha": "mean"}),
    ("UW", {"half": False}), ("UW", {"init": 0.0}), ("PCGrad", {"reduction": "mean"}), ("PCGrad", {"eps": 0.1}),
    ("PCGrad", {"order": "random", "seed": 5}), ("GradVac", {"beta": 0.4}), ("GradVac", {"update": "below"}),
    ("GradVac", {"group": "tensor"}), ("GradVac", {"order": "random", "seed": 5}), ("GradVac", {"eps": 0.1}),
    ("MoCo", {"b": 0.4}), ("MoCo", {"b_decay": 0.6}), ("MoCo", {"c": 0.2}), ("MoCo", {"c_decay": 0.0}),
    ("MoCo", {"rho": 0.5}), ("MoCo", {"normalize": False}), ("MoCo", {"projection": "simplex"}),
    ("Aligned_MTL", {"scale": "median"}), ("Aligned_MTL", {"reduction": "mean"}), ("CAGrad", {"c": 0.3}),
    ("CAGrad", {"rescale": 2}), ("CAGrad", {"times_tasks": True}), ("MGDA", {"normalize": "loss"}),
    ("MGDA", {"times_tasks": True}), ("Nash_MTL", {"max_norm": None}), ("FairGrad", {"alpha": 1.0}),
    ("FairGrad", {"max_norm": 1.0}),
]  # fmt: skip


@pytest.mark.parametrize("method, other", BREAKS, ids=[f"{m}-{next(iter(o))}" for m, o in BREAKS])
def test_libmtl_vectors_can_tell_the_difference(method, other):
    number = next(
        n
        for n in numbers(method)
        if CASES[n]["K"] == 5 and CASES[n]["hyper"].get("DB_beta", 0.5) == 0.5
    )
    name, hyper = NAMES[method]
    expected = run(number)[0]
    found = run(number, **other)[0]
    assert not torch.allclose(found[-1], expected[-1], rtol=1e-3)
    if method in EQUAL:
        assert last_is_equal(number) and not last_is_equal(number, **other)


# --------------------------------------------------------------------------------------------- LibMTL approximates


@each("MGDA")
def test_libmtl_mgda_is_never_shorter(number):
    """Both return the hull's point of the normalized gradients; ours satisfies the conditions of the shortest one."""
    case, (gradients, weights, _) = CASES[number], run(number)
    for step, found in enumerate(gradients):
        M, J, losses, w, expected = peer(number, step)
        norms = M.diagonal().sqrt()
        n = {"none": torch.ones_like(norms), "l2": norms, "loss+": losses * norms}[
            case["hyper"]["mgda_gn"]
        ]
        assert_close((w / n) @ J, expected, rtol=1e-12, atol=1e-12)  # what the peer solves
        ours = weights[step] * n
        assert ours.min() >= 0 and ours.sum().item() == pytest.approx(1, abs=1e-12)
        assert_close(weights[step] @ J, found, rtol=1e-10, atol=1e-12)
        length = found @ found
        assert length <= expected @ expected * (1 + 1e-12)
        assert ((J @ found) / n).min() >= length * (1 - 1e-9)  # no vertex of the hull lies nearer
        # the peer stops early, somewhere in the half space of the hull: the square root of the gap bounds the distance
        assert (found - expected).norm() ** 2 <= (expected @ expected - length) + 1e-10 * length
        assert expected.norm() <= 1.2 * found.norm()


@each("CAGrad")
def test_libmtl_cagrad_agrees_to_slsqp(number):
    case, (gradients, weights, _) = CASES[number], run(number)
    c, rescale = case["hyper"]["calpha"], case["hyper"]["rescale"]
    for step, found in enumerate(gradients):
        M, J, _, w, expected = peer(number, step)
        assert (found - expected).norm() <= 2e-3 * expected.norm()
        scale = 1 + c**2 if rescale else 1
        v = weights[step] * scale - 1 / case["K"]  # proportional to the weights of g_w
        assert v.min() > -1e-12
        v, mean = v / v.sum(), J.mean(0)

        def objective(w, J=J, mean=mean):
            return (w @ J) @ mean + c * mean.norm() * (w @ J).norm()

        assert objective(v) <= objective(w) * (1 + 1e-12)
        d = found * scale
        assert (d - mean).norm() <= c * mean.norm() * (1 + 1e-9)
        assert (J @ d).min().item() == pytest.approx(
            objective(v).item(), rel=1e-8
        )  # no gap: the max-min is reached


@each("Nash_MTL")
def test_libmtl_nash_solves_what_the_peer_approaches(number):
    case, (gradients, weights, _) = CASES[number], run(number)
    for step, found in enumerate(gradients):
        M, J, _, w, expected = peer(number, step)
        ours, theirs = (((M @ a) * a - 1).abs().max().item() for a in (weights[step], w))
        assert ours < 1e-9 and ours < theirs
        assert found.norm().item() == pytest.approx(
            min(1.0, case["K"] ** 0.5), rel=1e-5
        )  # |G'a|^2 = T before the clip
        assert cosine(found, weights[step] @ J) == pytest.approx(1, abs=1e-12)
        if theirs < 1e-3:
            assert_close(found, expected, rtol=1e-4, atol=1e-5)
        else:  # its 20 convex steps did not get there
            assert case["K"] == 11
    assert case["K"] == 11 or theirs < 1e-3


@each("FairGrad")
def test_libmtl_fairgrad_solves_the_same_equation(number):
    case, (gradients, weights, _) = CASES[number], run(number)
    for step, found in enumerate(gradients):
        M, J, _, w, expected = peer(number, step)
        assert_close(found, expected, rtol=1e-6, atol=1e-7)
        goal = weights[step] ** (-1 / case["hyper"]["FairGrad_alpha"])
        assert_close(M @ weights[step], goal, rtol=1e-10, atol=0)
        assert_close(weights[step], w, rtol=1e-5, atol=0)

"""What LibMTL's own classes returned on random inputs (tests/data/README.md)."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl import make_balancer

CASES = json.loads(gzip.decompress((Path(__file__).parent / "data" / "libmtl.json.gz").read_bytes()))


def title(case):
    hyper = ",".join(f"{key}={value}" for key, value in case["hyper"].items())
    return f"{case['method']}({hyper})-{case['K']}x{case['P']}"


def balancer(case, shared, **options):
    if case["method"] == "EW":
        return make_balancer("EW", shared=shared, num_tasks=case["K"], **options)
    hyper = {"beta": case["hyper"]["DB_beta"], "beta_decay": case["hyper"]["DB_beta_sigma"]}
    return make_balancer("DB-MTL", shared=shared, num_tasks=case["K"], **hyper, **options)


def losses_with(values, jacobian, theta):
    """Losses of these values whose gradients are the rows of the Jacobian."""
    dot = jacobian @ theta
    return dot + (values - dot).detach()


def test_libmtl_vectors_are_all_there():
    assert [case["method"] for case in CASES].count("EW") == 4
    assert [case["method"] for case in CASES].count("DB_MTL") == 12


@pytest.mark.parametrize("route", ["loop", "split", "batched", "accumulate"])
@pytest.mark.parametrize("case", CASES, ids=title)
def test_libmtl_shared_gradients(case, route):
    parts = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (case["P"] // 2, case["P"] - case["P"] // 2)]
    ours = balancer(case, parts, **({} if route == "accumulate" else {"grads": route}))
    columns = (case["losses"], case["jacobians"], case["shared_gradients"])
    for values, jacobian, expected in zip(*(torch.tensor(c, dtype=torch.float64) for c in columns), strict=True):
        losses = losses_with(values, jacobian, torch.cat(parts)).unbind()
        if route == "accumulate":
            ours.accumulate(losses, 3)
            ours.backward()
        else:
            ours.backward(losses)
        assert_close(torch.cat([p.grad for p in parts]), expected, rtol=1e-10, atol=1e-10)
        for p in parts:
            p.grad = None


@pytest.mark.parametrize("break_it", [{"beta": 0.4}, {"beta_decay": 0.6}, {"alpha": "mean"}])
def test_libmtl_vectors_can_tell_the_difference(break_it):
    case = next(c for c in CASES if c["hyper"] == {"DB_beta": 0.5, "DB_beta_sigma": 0.5})
    theta = nn.Parameter(torch.zeros(case["P"], dtype=torch.float64))
    ours = make_balancer("DB-MTL", shared=[theta], num_tasks=case["K"], **break_it)
    for values, jacobian in zip(case["losses"], case["jacobians"], strict=True):
        theta.grad = None
        ours.backward(list(losses_with(torch.tensor(values).double(), torch.tensor(jacobian).double(), theta)))
    assert not torch.allclose(theta.grad, torch.tensor(case["shared_gradients"][-1]).double(), rtol=1e-3)

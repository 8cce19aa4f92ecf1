"""SDMGrad: the optimum by SciPy, momentum and scale by hand, its weights from step to step."""

import math

import pytest
import torch
from scipy.optimize import minimize
from torch.testing import assert_close

from dbmtl.gradient_balancing.sdmgrad import SDMGrad, descend_on_simplex, unit_scale

BAD = [
    ("pull", -0.1),
    ("pull", math.inf),
    ("lr", 0.0),
    ("lr", math.inf),
    ("momentum", 1.0),
    ("momentum", math.nan),
    ("steps", 0),
    ("steps", math.inf),
    ("steps", 2.5),
    ("steps", "20"),
    ("eps", -1.0),
    ("eps", math.inf),
    ("heads", "first"),
]


def test_sdmgrad_finds_the_optimum_where_the_rate_is_small(jacobians):
    J = jacobians(4)[0, 0] / 3
    C = J @ J.T
    pull = 0.3
    start = torch.full((4,), 0.25).double()
    w = descend_on_simplex(C, start, pull, lr=0.2, momentum=0.5, steps=1500)

    def length(w):
        return ((w + pull / 4) @ C.numpy() @ (w + pull / 4)).item() / 2

    best = minimize(
        length,
        start.numpy(),
        bounds=[(0, 1)] * 4,
        constraints=[{"type": "eq", "fun": lambda w: w.sum() - 1}],
        options={"ftol": 1e-14},
    ).x
    assert_close(w, torch.tensor(best), atol=1e-5, rtol=0)


def test_sdmgrad_momentum_by_hand():
    C = torch.tensor([[1.0, 0.0], [0.0, 2.0]]).double()
    w = descend_on_simplex(C, torch.tensor([0.5, 0.5]).double(), 0.0, lr=0.1, momentum=0.5, steps=2)
    # first velocity (0.5, 1), w (0.525, 0.475); then (0.25, 0.5) + (0.525, 0.95)
    assert_close(w, torch.tensor([0.525 - 0.0775 + 0.11125, 0.475 - 0.145 + 0.11125]).double())


@pytest.mark.parametrize("pull", [0.0, 0.3, 7.0])
def test_sdmgrad_direction_is_the_weighted_sum_plus_the_mean(pull, jacobians):
    first, second, third = jacobians(3, batches=3)[0]
    method = SDMGrad(pull=pull)
    weights = method(first @ second.T, torch.ones(3).double())
    w = method.memory["w"]
    assert_close(third.T @ weights, (third.T @ w + pull * third.mean(0)) / (1 + pull))
    assert_close(weights.sum(), torch.tensor(1.0).double())


def test_sdmgrad_unit_scale():
    C = torch.tensor([[9.0, 1.0], [2.0, -5.0]])
    assert_close(unit_scale(C), C / 2.25)
    C = torch.diag(torch.tensor([1.0, 2.0, 4.0])).double()
    for eps, is_invariant in ((0.0, True), (1e-8, False)):
        weights = SDMGrad(lr=0.1, eps=eps)(C, torch.ones(3))
        of_small = SDMGrad(lr=0.1, eps=eps)(1e-9 * C, torch.ones(3))
        assert torch.allclose(weights, of_small) == is_invariant


def test_sdmgrad_starts_from_the_last_weights():
    C = torch.diag(torch.tensor([1.0, 4.0, 9.0])).double()
    method = SDMGrad(lr=0.1, steps=3, normalize=False)
    for _ in range(4):
        method(C, torch.ones(3))
    start = torch.full((3,), 1 / 3).double()
    for _ in range(4):
        start = descend_on_simplex(C, start, 0.3, 0.1, 0.5, 3)
    assert_close(method.memory["w"], start)


def test_sdmgrad_reads_rows_from_the_first_batch():
    C = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double()
    assert SDMGrad(lr=0.1)(C, torch.ones(2))[0] < 0.5 < SDMGrad(lr=0.1)(C.T, torch.ones(2))[0]


@pytest.mark.parametrize("name, value", BAD)
def test_sdmgrad_names_a_bad_value(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        SDMGrad(**{name: value})
    assert str(value) in str(caught.value)

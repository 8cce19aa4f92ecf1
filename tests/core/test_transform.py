"""The loss axis: Proposition 3.1 by an independent minimizer, IMTL-L, and slopes by finite differences."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.testing import assert_close

from dbmtl import IMTLL, Identity, Log, Transform
from dbmtl.core.transform import slopes

SCALES = [10.0**e for e in range(-8, 9)]


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("x", SCALES)
def test_proposition_3_1_by_scipy(x):
    found = minimize_scalar(
        lambda s: math.exp(s) * x - s - 1, bracket=(-math.log(x) - 1, -math.log(x) + 2), tol=1e-12
    )
    assert found.fun == pytest.approx(math.log(x), abs=1e-12, rel=1e-13)
    slope, _ = slopes(Log(eps=0.0), float64(x))  # the envelope theorem: the derivative is e^s* ...
    assert slope.item() == pytest.approx(
        math.exp(found.x), rel=1e-6
    )  # ... and s* is known to the root of rounding
    assert slope.item() == pytest.approx(1 / x, rel=1e-14)


@pytest.mark.parametrize("x", SCALES)
def test_imtl_l_at_its_minimizer_is_the_log(x):
    learned = IMTLL(1).double()
    learned.s.data.fill_(-math.log(x))
    assert_close(learned(float64(x)), float64(math.log(x) + 1), rtol=1e-12, atol=1e-12)
    slope, (of_scale,) = slopes(learned, float64(x))
    assert_close(slope, float64(1 / x), rtol=1e-12, atol=0)
    assert_close(of_scale, float64(0.0), rtol=0, atol=1e-12)


def test_imtl_l_descends_to_minus_the_log():
    learned, losses = IMTLL(3).double(), float64(0.05, 1.0, 6.0)
    assert_close(learned.s.detach(), float64(0, 0, 0))
    for _ in range(3000):
        _, (of_scale,) = slopes(learned, losses)
        learned.s.data -= 0.1 * of_scale
    assert_close(learned.s.detach(), -losses.log(), rtol=1e-9, atol=1e-9)


class Geometric(Transform):
    """A scalar-valued transform."""

    def forward(self, losses):
        return losses.log().mean().exp()


@pytest.mark.parametrize(
    "transform", [Identity(), Log(), Log(0.5), IMTLL(3).double(), Geometric()], ids=repr
)
def test_slopes_are_derivatives(transform):
    losses, h = float64(0.2, 1.0, 30.0), 1e-6
    for p in transform.parameters():
        p.data += float64(0.3, -0.2, 0.1)
    slope, _ = slopes(transform, losses)
    with torch.no_grad():
        sides = [
            [transform(losses + side * h * row).sum() for row in torch.eye(3)] for side in (1, -1)
        ]
    assert_close(
        slope, (torch.stack(sides[0]) - torch.stack(sides[1])) / (2 * h), rtol=1e-7, atol=1e-9
    )


def test_slopes_of_the_learned_scales():
    learned = IMTLL(2).double()
    learned.s.data.copy_(float64(0.5, -1.0))
    _, (of_scale,) = slopes(learned, float64(2.0, 3.0))
    assert_close(of_scale, float64(2 * math.exp(0.5) - 1, 3 * math.exp(-1) - 1))


@torch.no_grad()
def test_slopes_leave_nothing_behind():
    losses, learned = float64(2.0), IMTLL(1).double()
    slope, _ = slopes(learned, losses)
    assert not slope.requires_grad and not losses.requires_grad and learned.s.grad is None
    learned.s.requires_grad_(False)
    assert slopes(learned, losses)[1] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_slopes_follow_the_dtype_of_the_losses(dtype):
    assert slopes(Log(), torch.ones(2, dtype=dtype))[0].dtype == dtype


@pytest.mark.parametrize("transform, legal, illegal", [
    (Log(), [0.0, 1e-12, 1e20], [-1e-8, -1.0, math.nan, math.inf]),
    (Log(0.0), [1e-30], [0.0]),
    (Identity(), [-1.0, 0.0], [math.nan, -math.inf]),
    (IMTLL(1), [1e-30], [0.0, -1.0, math.inf]),
], ids=repr)  # fmt: skip
def test_domains(transform, legal, illegal):
    assert transform.valid(float64(*legal)).all()
    assert not transform.valid(float64(*illegal)).any()


def test_log_at_zero_has_slope_one_over_eps():
    assert_close(slopes(Log(1e-3), float64(0.0))[0], float64(1e3))


def test_log_refuses_a_negative_or_nan_eps():
    for eps in (-1e-9, math.nan):
        with pytest.raises(ValueError, match="eps must be a finite number at least 0, got"):
            Log(eps)

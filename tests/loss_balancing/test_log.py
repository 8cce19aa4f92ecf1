"""The logarithm and the identity: Proposition 3.1 by an independent minimizer, slopes, domains."""

import math

import pytest
import torch
from scipy.optimize import minimize_scalar
from torch.testing import assert_close

from dbmtl import Identity, Log
from dbmtl.core.transform import slopes

SCALES = [10.0**e for e in range(-8, 9)]


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("x", SCALES)
def test_proposition_3_1_by_scipy(x):
    bracket = (-math.log(x) - 1, -math.log(x) + 2)
    minimum = minimize_scalar(lambda s: math.exp(s) * x - s - 1, bracket=bracket, tol=1e-12)
    assert minimum.fun == pytest.approx(math.log(x), abs=1e-12, rel=1e-13)
    slope, _ = slopes(Log(eps=0.0), float64(x))
    # the envelope theorem: the derivative is e^s*, and s* is known to the root of rounding
    assert slope.item() == pytest.approx(math.exp(minimum.x), rel=1e-6)
    assert slope.item() == pytest.approx(1 / x, rel=1e-14)


@pytest.mark.parametrize("transform", [Identity(), Log(), Log(0.5)], ids=repr)
def test_log_slopes_are_derivatives(transform, central_differences):
    losses = float64(0.2, 1.0, 30.0)
    slope, _ = slopes(transform, losses)
    numeric = central_differences(
        lambda at: transform(at).sum(), losses, torch.full_like(losses, 1e-6)
    )
    assert_close(slope, numeric, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("transform, legal, illegal", [
    (Log(), [0.0, 1e-12, 1e20], [-1e-8, -1.0, math.nan, math.inf]),
    (Log(0.0), [1e-30], [0.0]),
    (Identity(), [-1.0, 0.0], [math.nan, -math.inf]),
], ids=repr)  # fmt: skip
def test_log_domains(transform, legal, illegal):
    assert transform.valid(float64(*legal)).all()
    assert not transform.valid(float64(*illegal)).any()


def test_log_at_zero_has_slope_one_over_eps():
    assert_close(slopes(Log(1e-3), float64(0.0))[0], float64(1e3))


@pytest.mark.parametrize("factor", [1e-6, 1e-2, 1e3, 1e9])
def test_log_does_not_depend_on_the_unit(factor):
    losses = float64(0.2, 1.0, 30.0)
    own_unit = slopes(Log(0.0), losses)[0] * losses
    other_unit = slopes(Log(0.0), losses * factor)[0] * losses * factor
    assert_close(other_unit, own_unit, rtol=1e-14, atol=0)


def test_log_refuses_a_negative_or_nan_eps():
    for eps in (-1e-9, math.nan):
        with pytest.raises(ValueError, match="eps must be a finite number at least 0, got"):
            Log(eps)

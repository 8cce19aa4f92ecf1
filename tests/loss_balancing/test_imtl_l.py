"""IMTL-L: the logarithm at its minimizer, slopes and gradients of its scales."""

import math

import pytest
import torch
from torch.testing import assert_close

from dbmtl import IMTLL
from dbmtl.core.transform import slopes

SCALES = [10.0**e for e in range(-8, 9)]


def float64(*values):
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("x", SCALES)
def test_imtl_l_at_its_minimizer_is_the_log(x):
    learned = IMTLL(1).double()
    learned.s.data.fill_(-math.log(x))
    assert_close(learned(float64(x)), float64(math.log(x) + 1), rtol=1e-12, atol=1e-12)
    slope, [scale_gradient] = slopes(learned, float64(x))
    assert_close(slope, float64(1 / x), rtol=1e-12, atol=0)
    assert_close(scale_gradient, float64(0.0), rtol=0, atol=1e-12)


def test_imtl_l_descends_to_minus_the_log():
    learned = IMTLL(3).double()
    losses = float64(0.05, 1.0, 6.0)
    assert_close(learned.s.detach(), float64(0, 0, 0))
    for _ in range(3000):
        _, [scale_gradient] = slopes(learned, losses)
        learned.s.data -= 0.1 * scale_gradient
    assert_close(learned.s.detach(), -losses.log(), rtol=1e-9, atol=1e-9)


def test_imtl_l_slopes_are_derivatives(central_differences):
    learned = IMTLL(3).double()
    learned.s.data += float64(0.3, -0.2, 0.1)
    losses = float64(0.2, 1.0, 30.0)
    slope, _ = slopes(learned, losses)
    numeric = central_differences(
        lambda at: learned(at).sum(), losses, torch.full_like(losses, 1e-6)
    )
    assert_close(slope, numeric, rtol=1e-7, atol=1e-9)


def test_imtl_l_gradients_of_its_scales():
    learned = IMTLL(2).double()
    learned.s.data.copy_(float64(0.5, -1.0))
    _, [scale_gradient] = slopes(learned, float64(2.0, 3.0))
    assert_close(scale_gradient, float64(2 * math.exp(0.5) - 1, 3 * math.exp(-1) - 1))


def test_imtl_l_domain():
    assert IMTLL(1).valid(float64(1e-30)).all()
    assert not IMTLL(1).valid(float64(0.0, -1.0, math.inf)).any()

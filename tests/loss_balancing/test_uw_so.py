"""UW-SO: hand-computed weights, limits of the temperature, extreme losses."""

import math

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.transform import slopes
from dbmtl.loss_balancing.uw_so import UWSO, inverse_loss_weights

F64 = torch.float64


def test_uw_so_by_hand():
    weights = inverse_loss_weights(torch.tensor([1.0, 0.5, 0.25], dtype=F64), 2.0)
    powers = [math.exp(0.5), math.exp(1.0), math.exp(2.0)]
    assert_close(weights, torch.tensor(powers, dtype=F64) / sum(powers))


def test_uw_so_weights_are_held_constant_in_the_gradient():
    losses = torch.tensor([0.7, 0.3, 1.9], dtype=F64)
    assert_close(slopes(UWSO(), losses)[0], inverse_loss_weights(losses, 1.0))


@pytest.mark.parametrize("temperature", [0.1, 1.0, 30.0])
def test_uw_so_scaling_losses_is_scaling_the_temperature(temperature):
    losses = torch.tensor([0.7, 0.3, 1.9], dtype=F64)
    scaled = inverse_loss_weights(5 * losses, temperature)
    assert_close(scaled, inverse_loss_weights(losses, 5 * temperature))


def test_uw_so_limits_of_the_temperature():
    losses = torch.tensor([0.7, 0.3, 1.9], dtype=F64)
    equal = torch.full((3,), 1 / 3, dtype=F64)
    assert_close(inverse_loss_weights(losses, 1e9), equal)
    smallest = torch.tensor([0.0, 1.0, 0.0], dtype=F64)
    assert_close(inverse_loss_weights(losses, 1e-3), smallest)


def test_uw_so_small_float32_losses_stay_finite():
    slope = slopes(UWSO(), torch.tensor([1e-44, 1.0, 1e38]))[0]
    assert_close(slope, torch.tensor([1.0, 0.0, 0.0]))


def test_uw_so_zero_is_outside_the_domain():
    assert UWSO().valid(torch.tensor([0.0, 1e-40, -1.0])).tolist() == [False, True, False]


@pytest.mark.parametrize("temperature", [0, -1, float("inf"), "hot"])
def test_uw_so_refuses_what_is_no_temperature(temperature):
    with pytest.raises(ValueError, match="temperature must be a finite number above 0"):
        UWSO(temperature)

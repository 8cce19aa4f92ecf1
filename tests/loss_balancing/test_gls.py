"""GLS: hand-computed numbers, the direction of the log-sum, small and large losses."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.transform import slopes
from dbmtl.loss_balancing.gls import GLS
from dbmtl.loss_balancing.log import Log

F64 = torch.float64


def test_gls_by_hand_and_direction_of_the_log_sum():
    losses = torch.tensor([1.0, 4.0, 16.0], dtype=F64)
    assert_close(GLS()(losses), torch.tensor(4.0, dtype=F64))
    slope = slopes(GLS(), losses)[0]
    assert_close(slope, 4 / (3 * losses))
    assert_close(slope, slopes(Log(eps=0.0), losses)[0] * 4 / 3)


@pytest.mark.parametrize("size", [1e-40, 1e-20, 1e-4, 1e4, 1e30])
def test_gls_does_not_underflow(size):
    """Eleven equal losses have slopes 1/11, also where the float32 product is 0 or infinite."""
    losses = torch.full((11,), size)
    assert_close(slopes(GLS(), losses)[0], torch.full((11,), 1 / 11))
    assert_close(GLS()(losses), losses[0], rtol=1e-4, atol=0)


def test_gls_float32_losses_lose_nothing(draw):
    losses = (draw(11)[0] * 1e-30).float()
    wide = slopes(GLS(), losses.double())[0]
    assert_close(slopes(GLS(), losses)[0], wide.float(), rtol=2e-7, atol=0)


def test_gls_zero_is_outside_the_domain():
    assert GLS().valid(torch.tensor([0.0, 1e-40, -1.0])).tolist() == [False, True, False]

"""RLW: the distribution of its weights, their sum, and whose random numbers it draws."""

import math

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.transform import slopes
from dbmtl.loss_balancing.rlw import RLW

F64 = torch.float64


def test_rlw_softmax_of_normal_numbers():
    method = RLW(2, seed=0)
    logits = []
    for _ in range(6000):
        w = slopes(method, torch.ones(2, dtype=F64))[0]
        logits.append((w[0] / w[1]).log())
        assert abs(w.sum() - 1) < 1e-12
        method.advance(torch.ones(2))
    logits = torch.stack(logits)
    assert abs(logits.mean()) < 0.06 and abs(logits.var() - 2) < 0.12
    within_one_deviation = (logits.abs() < math.sqrt(2)).double().mean()
    assert abs(within_one_deviation - 0.6827) < 0.02  # of a normal distribution


def test_rlw_seed_and_total():
    ones = torch.ones(4, dtype=F64)
    assert_close(slopes(RLW(4, seed=5), ones)[0], slopes(RLW(4, seed=5), ones)[0], rtol=0, atol=0)
    assert not torch.equal(slopes(RLW(4, seed=5), ones)[0], slopes(RLW(4, seed=6), ones)[0])
    assert_close(slopes(RLW(4, total="T", seed=5), ones)[0].sum(), torch.tensor(4.0, dtype=F64))
    assert repr(RLW(4, seed=5)) == repr(RLW(4))  # the seed is state, not configuration


def test_rlw_forward_leaves_the_global_stream_alone(step):
    method = RLW(3)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    for _ in range(3):
        step(method, torch.ones(3))
    assert_close(torch.rand(2), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("total", "message"),
    [
        (0.0, "total must be a finite number above 0, got 0.0"),
        (math.inf, "total must be a finite number above 0, got inf"),
        ("t", "total must be 'T' or a number above 0, got 't'"),
    ],
)
def test_rlw_total_is_checked(total, message):
    with pytest.raises(ValueError, match=message):
        RLW(2, total=total)

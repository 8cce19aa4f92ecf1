"""MoDo: steps by hand, and weights that are right on average."""

import math

import pytest
import torch
from torch.testing import assert_close

from dbmtl.gradient_balancing.modo import MoDo

BAD = [
    ("gamma", -1.0),
    ("gamma", math.nan),
    ("gamma", math.inf),
    ("rho", -1.0),
    ("rho", math.inf),
    ("heads", None),
]


def test_modo_by_hand():
    method = MoDo(gamma=0.1, rho=1.0)
    C = torch.tensor([[3.0, 0.0], [0.0, 1.0]]).double()
    losses = torch.ones(2).double()
    # (0.3, 0.4) + 0.15
    assert_close(method(C, losses), torch.tensor([0.45, 0.55]).double())
    expected = torch.tensor([0.45 * 0.6, 0.55 * 0.8]).double()
    assert_close(method(C, losses), expected + (1 - expected.sum()) / 2)


def test_modo_two_batches_are_right_on_average_and_one_is_not(float64):
    truth = float64([1.0, 0.0, 0.0, 0.0], [0.0, 2.0, 0.0, 0.0])
    noise = torch.tensor([[1.0], [0.1]])
    generator = torch.Generator().manual_seed(3)
    level = {}
    for num_batches in (2, 1):
        method = MoDo(gamma=0.01, rho=0.0)
        path = []
        for _ in range(1500):
            first, second = truth + noise * torch.randn(2, 2, 4, generator=generator).double()
            C = first @ (second if num_batches == 2 else first).T
            path.append(method(C, torch.ones(2))[0])
        level[num_batches] = torch.stack(path[300:]).mean().item()
    assert abs(level[2] - 0.8) < 0.04
    assert abs(level[1] - 4.04 / 9.04) < 0.04  # diagonal 1 + 4 * 1^2 and 4 + 4 * 0.1^2


def test_modo_reads_rows_from_the_first_batch():
    C = torch.tensor([[1.0, 2.0], [0.0, 1.0]]).double()
    assert MoDo()(C, torch.ones(2))[0] < 0.5 < MoDo()(C.T, torch.ones(2))[0]


@pytest.mark.parametrize("name, value", BAD)
def test_modo_names_a_bad_value(name, value):
    with pytest.raises(ValueError, match=name) as caught:
        MoDo(**{name: value})
    assert str(value) in str(caught.value)

"""LS: fixed weights by hand, through a balancer, and what it refuses."""

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl import make_balancer
from dbmtl.core.transform import slopes
from dbmtl.loss_balancing.ls import LS


def test_ls_slopes_are_the_weights():
    losses = torch.tensor([2.0, 3.0, 0.0])
    assert_close(slopes(LS(3, [0.5, 0, 4]), losses)[0], torch.tensor([0.5, 0.0, 4.0]))
    assert_close(LS(3, [0.5, 0, 4])(losses), torch.tensor([1.0, 0.0, 0.0]))


def gradients(backward):
    torch.manual_seed(0)
    trunk = nn.Linear(3, 4)
    heads = nn.ModuleList(nn.Linear(4, 1) for _ in range(2))
    z = trunk(torch.linspace(-1, 1, 15).view(5, 3)).tanh()
    losses = [(head(z) - t).square().mean() for t, head in enumerate(heads)]
    backward(trunk, losses)
    return [p.grad for p in (*trunk.parameters(), *heads.parameters())]


def test_ls_is_backward_of_the_weighted_sum():
    def balanced(trunk, losses):
        make_balancer("LS", shared=trunk, num_tasks=2, weights=[0.25, 3.0]).backward(losses)

    def plain(trunk, losses):
        (0.25 * losses[0] + 3.0 * losses[1]).backward()

    assert_close(gradients(balanced), gradients(plain))


def test_ls_without_weights_is_equal_weighting():
    def by_name(name):
        return lambda trunk, losses: make_balancer(name, shared=trunk, num_tasks=2).backward(losses)

    assert_close(gradients(by_name("LS")), gradients(by_name("EW")), rtol=0, atol=0)


@pytest.mark.parametrize(
    "weights, message",
    [
        ([1, 2], "weights must be 3 numbers, got 2"),
        ([1, -1, 1], r"weights\[1\] must be a finite number at least 0, got -1"),
        ([1, float("nan"), 1], r"weights\[1\] .* got nan"),
        ([0, 0, 0], "at least one of the weights must be positive"),
    ],
)
def test_ls_refuses_what_is_no_weight(weights, message):
    with pytest.raises(ValueError, match=message):
        LS(3, weights)

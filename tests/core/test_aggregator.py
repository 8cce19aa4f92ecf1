"""What an aggregator answers to task gradients, before the balancer makes use of it."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.aggregator import (
    GradientAggregator,
    GramianAggregator,
    KeptWeights,
    NormAggregator,
    StepGradients,
)


def rows(*numbers):
    """One task gradient for each number, of one parameter."""
    return StepGradients([[torch.tensor([number])] for number in numbers], positions=[0])


class Moving(GradientAggregator):
    """Writes finished updates, and relies on finite gradients."""

    moves_alone = True

    def forward(self, rows, losses, positions):
        raise AssertionError("not to be asked for gradients that are not finite")


class Weighing(GramianAggregator):
    """Weighs the heads too, and relies on finite gradients."""

    weights_heads = True
    forward = Moving.forward


@pytest.mark.parametrize("kind", [Moving, Weighing])
def test_a_gradient_that_is_not_finite_shows_in_every_weight(kind):
    choice = kind().choose(rows(1.0, torch.inf, 2.0), torch.ones(3))
    assert choice.finite.tolist() == [True, False, True]
    assert choice.weights.isnan().all()
    assert choice.heads.isnan().all()
    assert_close(choice.lengths.float(), torch.tensor([1.0, torch.inf, 2.0]))


class Inverse(NormAggregator):
    """Gradients of length one, however short they were."""

    def forward(self, lengths, losses):
        return 1 / lengths


def test_the_weight_of_a_vanished_gradient_is_large_and_finite():
    choice = Inverse().choose(rows(0.5, 0.0), torch.ones(2))
    assert_close(choice.weights, torch.tensor([2.0, 3e38]))
    assert choice.heads is None


class Tensors(NormAggregator):
    """A weight for each tensor says nothing of the heads."""

    weights_heads = True

    def forward(self, lengths, losses):
        return lengths[:, None]


def test_weights_for_each_tensor_do_not_weigh_the_heads():
    assert Tensors().choose(rows(1.0, 2.0), torch.ones(2)).heads is None


def test_kept_weights_serve_the_tasks_that_were_measured_as_long_as_they_last():
    kept = KeptWeights(torch.tensor([1.0, 0.0, 3.0]), torch.tensor([4.0, 0.0, 6.0]), [0, 2], 1)
    assert kept.serve([0, 2]) and kept.serve([2]) and not kept.serve([1, 2])
    choice = kept.choice([2])
    assert (choice.weights.tolist(), choice.heads.tolist()) == ([3.0], [6.0])
    assert kept.choice(None).weights is kept.weights
    assert not kept.used().serve([0])

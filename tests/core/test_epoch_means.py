"""Means over an epoch: hand-computed numbers, windows, forgotten ends."""

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.epoch_means import EpochMeans

F64 = torch.float64


def test_epoch_means_by_hand():
    means = EpochMeans(2)
    for losses in ([1.0, 10.0], [3.0, 30.0], [float("nan"), 5.0]):
        means.see(torch.tensor(losses))
    means.finish()
    assert_close(means.last, torch.tensor([2.0, 20.0], dtype=F64))
    assert means.before is None and means.epoch == 1
    means.finish([7.0, 8.0])
    assert_close(means.last, torch.tensor([7.0, 8.0], dtype=F64))
    assert_close(means.before, torch.tensor([2.0, 20.0], dtype=F64))
    with pytest.raises(RuntimeError, match="no step"):
        means.finish()
    with pytest.raises(ValueError, match="finite"):
        means.finish([float("nan"), 1.0])
    assert means.epoch == 2


def test_epoch_means_window_and_limit():
    means = EpochMeans(1, window=3)
    for k in range(7):
        means.see(torch.tensor([float(k)]))
    assert means.epoch == 2 and means.last.item() == 4 and means.before.item() == 1
    means.finish([100.0])
    assert means.epoch == 2
    limited = EpochMeans(1, longest=2)
    for _ in range(2):
        limited.see(torch.ones(1))
    limited.check("X")
    limited.see(torch.ones(1))
    with pytest.raises(RuntimeError, match=r"X .*3 steps.*balancer\.end_epoch\("):
        limited.check("X")
    limited.finish()
    limited.check("X")


def test_a_window_without_a_finite_loss_goes_on_to_the_next_one():
    means = EpochMeans(1, window=2)
    for _ in range(3):
        means.see(torch.tensor([float("nan")]))
    assert means.epoch == 0
    means.see(torch.tensor([5.0]))
    assert means.epoch == 1 and means.last.item() == 5
    means.see(torch.tensor([6.0]))
    assert means.epoch == 1  # the steps of the next window are counted from its beginning


def test_means_that_were_given_keep_no_graph():
    means = EpochMeans(2)
    given = torch.tensor([1.0, 2.0], requires_grad=True)
    means.finish(given * 2)
    assert not means.last.requires_grad
    assert_close(means.last, torch.tensor([2.0, 4.0], dtype=F64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_tasks": 0}, "num_tasks must be a whole number from 1, got 0"),
        ({"window": 2.0}, "window must be a whole number from 1, got 2.0"),
        ({"longest": True}, "longest must be a whole number from 1, got True"),
    ],
)
def test_epoch_means_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        EpochMeans(**{"num_tasks": 2} | options)

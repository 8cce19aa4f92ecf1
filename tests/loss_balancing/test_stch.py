"""STCH: hand-computed numbers, its warm-up, the limits of its smoothing, losses of zero."""

import math

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.transform import slopes
from dbmtl.loss_balancing.stch import STCH

F64 = torch.float64


def proper(mu, nadir):
    method = STCH(len(nadir), mu=mu, warmup=0)
    method.end_epoch(nadir)
    return method


def test_stch_by_hand():
    slope = slopes(proper(1.0, [1.0, 2.0]), torch.tensor([1.0, 4.0]))[0]
    assert_close(slope, torch.tensor([2 / 3, 1 / 3]))
    assert_close(
        proper(2.0, [1.0, 1.0])(torch.tensor([4.0, 16.0])), torch.tensor(2 * 2 * math.log(2 + 4))
    )


def test_stch_warms_up_for_four_epochs_and_measures_in_the_next():
    method = STCH(2)
    losses = torch.tensor([0.5, 4.0], dtype=F64)
    for epoch in range(5):
        assert_close(slopes(method, losses)[0], 1 / losses)
        for _ in range(3):
            method.advance(losses * (epoch + 1))
        method.end_epoch(None)
    assert_close(method.memory["nadir"], 5 * losses)
    assert_close(slopes(method, losses)[0], 1 / losses)  # both tasks are a fifth of their nadir
    uneven = losses * torch.tensor([1.0, 3.0], dtype=F64)
    assert_close(slopes(method, uneven)[0], 2 * torch.tensor([0.25, 0.75], dtype=F64) / uneven)
    for _ in range(3):
        method.end_epoch(None)  # no more epochs are needed, and none does harm
    assert_close(method.memory["nadir"], 5 * losses)


def test_stch_window_keeps_the_nadir_of_its_warm_up():
    method = STCH(1, warmup=1, window=2)
    for k in range(12):
        method.advance(torch.tensor([float(k)]))
    assert_close(method.memory["nadir"], torch.tensor([2.5], dtype=F64))


def test_stch_smooth_maximum_and_its_limits(draw):
    losses = draw(5)[0]
    for mu in (0.01, 0.1, 1.0, 10.0):
        value = proper(mu, [1.0] * 5)(losses) / 5
        top = losses.log().max()
        assert top - 1e-12 <= value <= top + mu * math.log(5) + 1e-12
    sharp = slopes(proper(1e-3, [1.0] * 5), losses)[0]
    assert_close(sharp, torch.where(losses == losses.max(), 5 / losses, 0.0), atol=1e-6, rtol=1e-6)
    assert_close(slopes(proper(1e6, [1.0] * 5), losses)[0], 1 / losses, rtol=1e-4, atol=0)


def test_stch_scaling_a_loss_and_its_nadir(draw):
    losses = draw(3)[0]
    unit = torch.tensor([1.0, 1e3, 1e-3], dtype=F64)
    one = proper(0.5, [0.5, 1.0, 2.0])
    other = proper(0.5, torch.tensor([0.5, 1.0, 2.0]) * unit)
    assert_close(slopes(other, losses * unit)[0] * unit, slopes(one, losses)[0])


@pytest.mark.parametrize("nadir", [[1.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
@pytest.mark.parametrize("losses", [[0.0, 0.0], [0.0, 1.0], [1e30, 1e-30]])
@pytest.mark.parametrize("mu", [0.01, 1.0, 100.0])
def test_stch_zero_losses_and_zero_nadir_are_defined(nadir, losses, mu):
    method = proper(mu, nadir)
    assert slopes(method, torch.tensor(losses))[0].isfinite().all()
    assert method(torch.tensor(losses)).isfinite()


def test_stch_forgotten_epoch_and_bad_means():
    method = STCH(2, longest=3)
    for _ in range(4):
        method.advance(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"STCH .*balancer\.end_epoch\("):
        slopes(method, torch.ones(2))
    with pytest.raises(ValueError, match="means must be finite and not negative"):
        method.end_epoch([1.0, -1.0])
    done = proper(1.0, [1.0, 1.0])
    for _ in range(5):
        done.advance(torch.ones(2))
    slopes(done, torch.ones(2))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mu": 0.0}, "mu must be a finite number above 0, got 0.0"),
        ({"warmup": 1.5}, "warmup must be a whole number from 0, got 1.5"),
        ({"eps": -1.0}, "eps must be a finite number at least 0, got -1.0"),
    ],
)
def test_stch_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        STCH(2, **options)

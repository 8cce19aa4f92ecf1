"""DWA: hand-computed numbers, epochs and windows, losses of zero."""

import math

import pytest
import torch
from torch.testing import assert_close

from dbmtl.core.transform import slopes
from dbmtl.loss_balancing.dwa import DWA

F64 = torch.float64


def test_dwa_by_hand():
    method = DWA(3)
    ones = torch.ones(3, dtype=F64)
    assert_close(slopes(method, ones)[0], ones)
    method.end_epoch(torch.tensor([2.0, 4.0, 1.0]))
    assert_close(slopes(method, ones)[0], ones)
    method.end_epoch(torch.tensor([1.0, 4.0, 3.0]))
    e = [math.exp(0.25), math.exp(0.5), math.exp(1.5)]
    assert_close(slopes(method, ones)[0], 3 * torch.tensor(e, dtype=F64) / sum(e))
    method.end_epoch(torch.tensor([1.0, 4.0, 3.0]))
    assert_close(slopes(method, ones)[0], ones)


def test_dwa_takes_its_own_means_and_ignores_units(draw):
    batches = draw(3, 12)
    unit = torch.tensor([1.0, 1e3, 1e-3], dtype=F64)
    own, given, scaled = (DWA(3) for _ in range(3))
    for epoch in batches.split(4):
        for losses in epoch:
            for method, factor in ((own, 1), (given, 1), (scaled, unit)):
                method.advance(losses * factor)
        own.end_epoch(None)
        scaled.end_epoch(None)
        given.end_epoch(epoch.mean(0))
    assert_close(own.weights(), given.weights())
    assert_close(own.weights(), scaled.weights())
    assert own.weights().max() > 1.01


@pytest.mark.parametrize(
    ("before", "last", "expected"),
    [
        ([0.0, 1.0], [0.0, 1.0], [1.0, 1.0]),
        ([0.0, 1.0], [1.0, 1.0], [2.0, 0.0]),
        ([0.0, 0.0], [1.0, 3.0], [1.0, 1.0]),
        ([2.0, 1.0], [0.0, 0.0], [1.0, 1.0]),
    ],
)
def test_dwa_zero_losses_are_defined(before, last, expected):
    method = DWA(2)
    method.end_epoch(before)
    method.end_epoch(last)
    assert_close(method.weights(), torch.tensor(expected, dtype=F64))


def test_dwa_window_of_nash_mtl_and_a_forgotten_epoch():
    method = DWA(2, window=25, total=1.0)
    for k in range(50):
        assert_close(method.weights(), torch.full((2,), 0.5, dtype=F64))
        method.advance(torch.tensor([1.0 + (k >= 25), 1.0]))
    e = torch.tensor([2.0, 1.0], dtype=F64).div(2).exp()
    assert_close(method.weights(), e / e.sum())
    method.end_epoch(None)  # a loop that says so anyway does no harm
    assert_close(method.weights(), e / e.sum())
    silent = DWA(2, longest=3)
    for _ in range(4):
        slopes(silent, torch.ones(2))
        silent.advance(torch.ones(2))
    with pytest.raises(RuntimeError, match=r"DWA .*balancer\.end_epoch\(.*window="):
        slopes(silent, torch.ones(2))


def test_dwa_refuses_bad_means():
    with pytest.raises(ValueError, match="means must be finite and not negative"):
        DWA(2).end_epoch([1.0, -1.0])
    with pytest.raises(ValueError, match="expected means of 2 tasks"):
        DWA(2).end_epoch([1.0, 1.0, 1.0])


def test_dwa_long_epochs_are_told_of_longest():
    dwa = DWA(1, longest=2)
    for _ in range(3):
        dwa.advance(torch.ones(1))
    with pytest.raises(
        RuntimeError,
        match=r"balancer\.end_epoch.*window=.*more steps than 2 needs a larger longest=",
    ):
        dwa(torch.ones(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature must be a finite number above 0, got 0.0"),
        ({"window": 0}, "window must be a whole number from 1, got 0"),
        ({"total": "t"}, "total must be 'T'"),
    ],
)
def test_dwa_arguments_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        DWA(2, **options)

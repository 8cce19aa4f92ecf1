"""Meters: exact over a split, whatever its batches."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dbmtl.benchmarks.meters import Accuracy, MeanAbsoluteError


@given(st.integers(1, 60), st.integers(1, 60), st.floats(-3, 3))
@settings(max_examples=30, deadline=None)
def test_mae_meter_is_exact_whatever_the_batches(size, batch, power):
    generator = torch.Generator().manual_seed(size)
    prediction, target = torch.randn(2, size, generator=generator) * 10**power
    meter = MeanAbsoluteError(factor=2.5)
    for p, t in zip(prediction.split(batch), target.split(batch), strict=True):
        meter.update(p, t)
    whole = 2.5 * (prediction - target).abs().double().mean()
    assert_close(
        torch.tensor(meter.compute()["MAE"], dtype=torch.float64), whole, rtol=1e-12, atol=0
    )


def test_mae_meter_sums_in_float64():
    meter = MeanAbsoluteError()
    meter.update(torch.tensor([2.0**25]), torch.zeros(1))
    for _ in range(4):
        meter.update(torch.ones(1), torch.zeros(1))  # 2^25 + 1 is not a float32
    assert meter.compute() == {"MAE": (2.0**25 + 4) / 5}


def test_mae_meter_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="differ in shape"):
        MeanAbsoluteError().update(torch.zeros(4, 1), torch.zeros(4))


def test_accuracy_meter_counts_over_unequal_batches():
    meter = Accuracy()
    scores = torch.eye(3)[torch.tensor([0, 1, 2, 2])]
    meter.update(scores[:3], torch.tensor([0, 1, 0]))
    meter.update(scores[3:], torch.tensor([2]))
    assert meter.compute() == {"Acc": 75.0}


def test_meters_without_samples_answer_zero():
    with pytest.warns(UserWarning, match="before the ``update`` method"):
        assert MeanAbsoluteError().compute() == {"MAE": 0}
        assert Accuracy("accuracy").compute() == {"accuracy": 0}

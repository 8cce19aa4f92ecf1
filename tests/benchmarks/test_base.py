"""A benchmark as data: meters, floors, scales, names and the toys."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from dbmtl.benchmarks.base import (
    Accuracy,
    Benchmark,
    MeanAbsoluteError,
    Metric,
    Scale,
    TensorSplit,
    benchmark_names,
    constant_floor,
    get_benchmark,
    toy,
    toy_multi,
)
from dbmtl.core.checks import unknown_name


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


def test_constant_floor_of_the_mean_and_of_the_majority():
    floor = constant_floor(toy.tasks[0], torch.tensor(1.0), torch.tensor([0.0, 1.0, 5.0]))
    assert floor == {"MAE": 5 / 3}
    task = replace(toy.tasks[0], meter=Accuracy, metrics=(Metric("Acc", "up"),))
    assert constant_floor(task, torch.tensor([0.0, 1.0]), torch.tensor([1, 1, 0, 1])) == {
        "Acc": 75.0
    }


@pytest.mark.parametrize("benchmark", [toy, toy_multi], ids=lambda b: b.name)
def test_toy_floors_are_those_of_the_training_mean(benchmark):
    data = benchmark.load(benchmark.scale("smoke"), "cpu", 0)
    pick = (lambda split: split["large"]) if benchmark.multi_input else (lambda split: split)
    mean = pick(data.train).targets["large"].mean()
    for split, floors in ((data.test, data.floors), (data.validation, data.floors_validation)):
        expected = (pick(split).targets["large"] - mean).abs().double().mean().item()
        assert floors["large"]["MAE"] == pytest.approx(expected, rel=1e-12)


def test_toy_splits_do_not_overlap_and_do_not_depend_on_the_seed():
    one, two = (toy.load(toy.scale("smoke"), "cpu", seed) for seed in (0, 1))
    assert torch.equal(one.train.inputs, two.train.inputs) and one.hash == two.hash
    assert not set(one.train.inputs[:, 0].tolist()) & set(one.test.inputs[:, 0].tolist())
    assert one.hash != toy.load(replace(toy.scale("smoke"), train_size=91), "cpu", 0).hash
    assert one.hash != toy_multi.load(toy_multi.scale("smoke"), "cpu", 0).hash


def test_tensor_split_hands_out_rows_by_index():
    split = TensorSplit(torch.arange(6.0).view(3, 2), {"a": torch.tensor([1, 2, 3])})
    inputs, targets = split.batch(torch.tensor([2, 0]))
    assert_close(inputs, torch.tensor([[4.0, 5.0], [0.0, 1.0]]))
    assert_close(targets["a"], torch.tensor([3, 1]))
    with pytest.raises(ValueError, match=r"targets\['a'\] has 2 rows, inputs have 3"):
        TensorSplit(torch.zeros(3), {"a": torch.zeros(2)})


@pytest.mark.parametrize(
    ("wrong", "near"),
    [("qm-9", "qm9"), ("QM9", "qm9"), ("toymulti", "toy-multi"), ("zzzzzz", None)],
)
def test_unknown_benchmark_names_the_nearest(wrong, near):
    with pytest.raises(ValueError, match="unknown benchmark") as caught:
        get_benchmark(wrong)
    assert (f"did you mean {near!r}" in str(caught.value)) == (near is not None)
    assert all(name in str(caught.value) for name in benchmark_names())


def test_unknown_name_ignores_case():
    assert "did you mean 'DB-MTL'" in str(unknown_name("method", "db-mtl", ["EW", "DB-MTL"]))


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match="'up' or 'down'"):
        Metric("MAE", "less")
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        Scale(epochs=1, batch_size=0, width=1)
    with pytest.raises(ValueError, match="schedule_on"):
        replace(toy, schedule_on="test")
    with pytest.raises(ValueError, match="one name"):
        replace(toy, tasks=(toy.tasks[0], toy.tasks[0]))
    assert isinstance(toy, Benchmark)

"""A benchmark as data: floors, scales, splits, optimizer, schedule and names."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dbmtl.benchmarks.base import (
    Benchmark,
    Metric,
    Scale,
    TensorSplit,
    adam,
    benchmark_names,
    constant_floor,
    get_benchmark,
    step_decay,
    subset,
)
from dbmtl.benchmarks.meters import Accuracy
from dbmtl.benchmarks.toy import toy
from dbmtl.core.checks import unknown_name


def test_constant_floor_of_the_mean_and_of_the_majority():
    floor = constant_floor(toy.tasks[0], torch.tensor(1.0), torch.tensor([0.0, 1.0, 5.0]))
    assert floor == {"MAE": 5 / 3}
    task = replace(toy.tasks[0], meter=Accuracy, metrics=(Metric("Acc", "up"),))
    floor = constant_floor(task, torch.tensor([0.0, 1.0]), torch.tensor([1, 1, 0, 1]))
    assert floor == {"Acc": 75.0}


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


@pytest.mark.parametrize("size", [0, 1, 40, 100])
def test_subset_is_fixed_nested_and_within_the_part(size):
    part = torch.arange(1000, 1100)
    chosen = subset(part, size)
    assert len(chosen) == (size or 100) == len(chosen.unique())
    assert set(chosen.tolist()) <= set(part.tolist())
    assert_close(subset(part, size), chosen, rtol=0, atol=0)
    if size:
        assert_close(subset(part, 100)[:size], chosen, rtol=0, atol=0)


@pytest.mark.parametrize("size", [-1, 101])
def test_subset_refuses_what_the_part_does_not_have(size):
    with pytest.raises(ValueError, match=f"size={size}: the test part has 100 samples"):
        subset(torch.arange(100), size, "the test part")


def test_options_of_a_scale_are_checked():
    scale = Scale(1, 1, 1, extra={"source": "real"})
    assert scale.option("source", ("generated", "real")) == "real"
    assert scale.option("weights", ("none", "imagenet"), default="none") == "none"
    with pytest.raises(ValueError, match=r"source must be one of \['generated'\], got 'real'"):
        scale.option("source", ("generated",))
    with pytest.raises(ValueError, match="weights must be one of .*, got None"):
        scale.option("weights", ("none", "imagenet"))


@pytest.mark.parametrize(
    ("extra", "every", "factor"),
    [({}, 3, 0.1), ({"decay_every": 2}, 2, 0.1), ({"decay_every": 2, "decay": 0.5}, 2, 0.5)],
)
def test_adam_and_step_decay_follow_the_scale(extra, every, factor):
    scale = Scale(1, 1, 1, learning_rate=0.01, extra=extra)
    optimizer = adam([torch.nn.Parameter(torch.zeros(1))], scale)
    assert optimizer.param_groups[0]["weight_decay"] == 0
    schedule = step_decay(optimizer, scale, every=3, factor=0.1)
    rates = []
    for _ in range(2 * every):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert rates == pytest.approx(every * [0.01] + every * [0.01 * factor])


def test_unknown_name_ignores_case():
    assert "did you mean 'DB-MTL'" in str(unknown_name("method", "db-mtl", ["EW", "DB-MTL"]))


def test_bad_fields_are_refused():
    with pytest.raises(ValueError, match=r"metric 'MAE' must be one of \['up', 'down'\]"):
        Metric("MAE", "less")
    with pytest.raises(ValueError, match="batch_size must be a whole number from 1, got 0"):
        Scale(epochs=1, batch_size=0, width=1)
    with pytest.raises(ValueError, match="schedule_on"):
        replace(toy, schedule_on="test")
    with pytest.raises(ValueError, match="one name"):
        replace(toy, tasks=(toy.tasks[0], toy.tasks[0]))
    assert isinstance(toy, Benchmark)

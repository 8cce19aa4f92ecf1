"""The Cityscapes benchmark: the paper's settings, generated streets, and real layouts in small."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from dbmtl.benchmarks.base import Scale, get_benchmark
from dbmtl.benchmarks.cityscapes import data_hash, generated_streets, load, make_network
from dbmtl.experiments.loop import Loop
from dbmtl.experiments.run import run_all
from dbmtl.report.paper import paper_directions, paper_table

BENCHMARK = get_benchmark("cityscapes")
TINY = Scale(
    epochs=1,
    batch_size=4,
    width=1,
    train_size=9,
    eval_size=5,
    extra={"source": "generated", "size": [16, 32], "weights": "none"},
)


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """MTAN's layout with six and three images; n has depth n / 100 and class n % 7 - 1."""
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path / "cache"))
    for part, count in (("train", 6), ("val", 3)):
        for n in range(count):
            arrays = {
                "image": np.full((16, 32, 3), n / 255),
                "label": np.full((16, 32), n % 7 - 1.0),
                "depth": np.full((16, 32, 1), n / 100),
            }
            for kind, array in arrays.items():
                file = tmp_path / "data" / "cityscapes" / part / kind / f"{n}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, array)
    return tmp_path / "data" / "cityscapes"


def real(scale=TINY, **changes):
    return replace(
        scale,
        **{"train_size": 0, "eval_size": 0} | changes,
        extra={**scale.extra, "source": "real"},
    )


def test_cityscapes_tasks_and_metrics_are_those_of_table_2():
    assert BENCHMARK.directions == paper_directions("cityscapes")
    assert list(paper_table("cityscapes")["STL"]) == BENCHMARK.task_names


def test_cityscapes_paper_scale_is_the_published_one():
    scale = BENCHMARK.scale("paper")
    assert (scale.epochs, scale.batch_size, scale.width, scale.learning_rate) == (200, 64, 64, 1e-4)
    assert (scale.train_size, scale.eval_size) == (0, 0)  # all: 2,975 and 500
    assert scale.extra == {
        "source": "real",
        "size": [128, 256],
        "weights": "imagenet",
        "weight_decay": 1e-5,
        "decay_every": 100,
        "decay": 0.5,
    }
    assert BENCHMARK.drop_last and not BENCHMARK.multi_input and BENCHMARK.schedule_on == "epoch"
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = BENCHMARK.optimizer([parameter], scale)
    schedule, rates = BENCHMARK.scheduler(optimizer, scale), []
    for _ in range(200):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    assert (
        isinstance(optimizer, torch.optim.Adam)
        and optimizer.param_groups[0]["weight_decay"] == 1e-5
    )
    assert rates == 100 * [1e-4] + 100 * [5e-5]


@pytest.mark.parametrize("name", ["gpu", "paper"])
def test_cityscapes_scratch_scales_differ_in_their_weights_alone(name):
    scale = BENCHMARK.scale(name)
    scratch = BENCHMARK.scale(f"{name}-scratch")
    assert scale.extra["weights"] == "imagenet"
    assert replace(scale, extra={**scale.extra, "weights": "none"}) == scratch


def test_cityscapes_scales_say_where_images_come_from():
    sources = {name: scale.extra["source"] for name, scale in BENCHMARK.scales.items()}
    assert {name for name, source in sources.items() if source == "generated"} == {
        "smoke",
        "generated",
        "small",
    }
    assert set(sources.values()) == {"generated", "real"}
    sizes = [{}, {"train_size": 8}, {"eval_size": 4}, {"extra": {**TINY.extra, "size": [32, 16]}}]
    assert len({data_hash(replace(TINY, **change)) for change in sizes}) == 4
    assert data_hash(TINY) == data_hash(replace(TINY, epochs=3), seed=5)


def test_cityscapes_generated_data_do_not_depend_on_the_seed_and_say_what_they_are():
    data = load(TINY, seed=0)
    again = load(TINY, seed=1)
    every = torch.arange(5)
    images, targets = data.train.batch(every)
    torch.testing.assert_close(images, again.train.batch(every)[0], rtol=0, atol=0)
    assert data.note.startswith("generated streets, 5 + 5 images at 16x32, 4 more cut")
    assert data.hash == again.hash == data_hash(TINY) and len(data.validation) == 4
    assert images.shape == (5, 3, 16, 32) and 0 <= images.min() and images.max() <= 1
    assert targets["segmentation"].shape == (5, 16, 32) and targets["depth"].shape == (5, 1, 16, 32)
    held_out = [*data.test.batch(torch.arange(5))[0], *data.validation.batch(torch.arange(4))[0]]
    assert not any(torch.equal(a, b) for a in images for b in held_out)


def test_cityscapes_more_generated_streets_begin_with_the_same():
    few, many = (generated_streets(replace(TINY, train_size=n))["train"] for n in (4, 9))
    torch.testing.assert_close(few["image"], many["image"][:4], rtol=0, atol=0)


def test_cityscapes_real_images_arrive_in_their_units(archive):
    data = load(real())
    # of the six images, 0, 1 and 4 are trained on; 2, 3 and 5 choose the epoch
    images, targets = data.train.batch(torch.tensor([2, 0, 1]))
    torch.testing.assert_close(images[:, 0, 0, 0], torch.tensor([4.0, 0, 1]) / 255)
    assert targets["segmentation"][:, 0, 0].tolist() == [3, 255, 0]
    torch.testing.assert_close(
        targets["depth"][:, 0, 0, 0], torch.tensor([0.04, 0, 0.01]), rtol=0, atol=1e-5
    )
    held_out = data.validation.batch(torch.arange(3))[0]
    torch.testing.assert_close(held_out[:, 0, 0, 0], torch.tensor([2.0, 3, 5]) / 255)
    assert data.note == (
        "Cityscapes as prepared by MTAN's authors, an incomplete copy, 3 + 3 images at 16x32, "
        "3 more cut from the training part to choose the epoch"
    )


def test_cityscapes_floors_by_hand(archive):
    data = load(real())
    # truth of test: void, class 0, class 1; of the equally frequent training classes 0 and 3 (and
    # void), the first is taken
    assert data.floors["segmentation"]["PAcc"] == 50
    assert data.floors["segmentation"]["mIoU"] == pytest.approx(
        (50 + 0) / 2
    )  # classes 0 and 1 occur
    mean = (0.01 + 0.04) / 2  # of the training images 0 (no depth), 1 and 4
    assert data.floors["depth"]["AErr"] == pytest.approx(
        ((mean - 0.01) + (mean - 0.02)) / 2, rel=1e-3
    )
    assert data.floors["depth"]["RErr"] == pytest.approx(
        ((mean - 0.01) / 0.01 + (mean - 0.02) / 0.02) / 2, rel=1e-3
    )


def test_cityscapes_subsets_of_real_images_are_fixed(archive):
    data = load(real(train_size=4, eval_size=2))
    again = load(real(train_size=4, eval_size=2), seed=3)
    images = []
    for split in ("train", "validation"):
        two = getattr(data, split).batch(torch.arange(2))[0]
        same = getattr(again, split).batch(torch.arange(2))[0]
        torch.testing.assert_close(two, same, rtol=0, atol=0)
        images += [*two]
    assert len({float(image.mean()) for image in images}) == 4 and len(data.test) == 2
    with pytest.raises(ValueError, match="train part of Cityscapes has 6 samples"):
        load(real(train_size=7))


def test_cityscapes_hash_is_known_once_prepared_and_follows_the_source(archive):
    assert data_hash(real()) is None
    first = load(real()).hash
    assert data_hash(real()) == first != data_hash(TINY)
    np.save(archive / "val/depth/2.npy", np.full((16, 32, 1), 0.3))
    assert data_hash(real()) != first and data_hash(real()) == load(real()).hash
    (archive / "val/depth/2.npy").unlink()
    assert data_hash(real()) is None
    with pytest.raises(FileNotFoundError, match="val 2 has no depth"):
        load(real())


def test_cityscapes_missing_images_give_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path))
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(
        FileNotFoundError, match="(?s)Cityscapes is not in.*label_7.*gtFine_trainvaltest.zip"
    ):
        load(BENCHMARK.scale("paper"))


@pytest.mark.parametrize("key, value", [("source", "photos"), ("weights", "random")])
def test_cityscapes_refuses_unknown_choices(key, value):
    scale = replace(TINY, extra={**TINY.extra, key: value})
    with pytest.raises(ValueError, match=value):
        load(scale) if key == "source" else make_network(scale, None, ["depth"])


def test_cityscapes_network_at_full_width_has_the_published_sizes():
    scale = replace(TINY, width=64)
    with torch.device("meta"):
        network = make_network(scale, None, BENCHMARK.task_names)
    parts = {"trunk": network.trunk, **network.heads}
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in parts.items()}
    assert sizes == {"trunk": 23_508_032, "segmentation": 16_127_239, "depth": 16_125_697}
    assert "not comparable" in network.notes[0]


def test_cityscapes_imagenet_weights_reach_the_trunk_and_are_named(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "dbmtl.benchmarks.dense_benchmark.load_imagenet",
        lambda trunk, name: asked.append((trunk, name)) or "file.pth",
    )
    network = make_network(
        replace(TINY, extra={**TINY.extra, "weights": "imagenet"}), None, ["depth"]
    )
    assert asked == [(network.trunk, "resnet50")] and network.notes == [
        "file.pth",
        f"width {TINY.width} instead of 64",
    ]


def test_cityscapes_precision_and_memory_format_come_from_the_scale(monkeypatch):
    options = {"channels_last": True, "precision": "bf16", "checkpoint": True}
    scale = replace(TINY, extra={**TINY.extra, **options})
    loop = Loop(BENCHMARK, load(scale), BENCHMARK.tasks, "DB-MTL", 0, scale)
    calls = []
    loop.model.trunk.conv1.register_forward_hook(
        lambda conv, inputs, output: calls.append(output.dtype)
    )
    loop.step()
    assert loop.model.trunk.conv1.weight.is_contiguous(memory_format=torch.channels_last)
    assert calls == 3 * [torch.bfloat16]  # once, and recomputed for each of two tasks
    assert loop.losses.isfinite().all()
    monkeypatch.setattr(
        "dbmtl.benchmarks.dense_benchmark.efficient", lambda network, **passed_on: passed_on
    )
    assert make_network(scale, None, ["depth"]) == options
    assert make_network(TINY, None, ["depth"]) == {}


def test_cityscapes_smoke_run_leaves_a_record_that_says_generated(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_OUT", str(tmp_path))
    (record,) = run_all("cityscapes", ["DB-MTL"], [0], "smoke")
    assert record["state"] == "finished"
    assert record["data"]["note"].startswith("generated streets")
    scratch = "ResNet-50 from scratch: not comparable with printed numbers"
    assert record["notes"] == [scratch, "width 2 instead of 64"]
    assert set(record["curves"]["test"]["depth"]) == {"AErr", "RErr"}


@pytest.mark.full
def test_cityscapes_equal_weighting_learns_generated_streets():
    scale = replace(
        BENCHMARK.scale("generated"),
        width=4,
        train_size=64,
        eval_size=16,
        learning_rate=3e-3,
        extra={**BENCHMARK.scale("generated").extra, "size": [32, 64]},
    )
    loop = Loop(BENCHMARK, load(scale), BENCHMARK.tasks, "EW", 0, scale)
    for _ in range(6):
        for _ in range(loop.steps):
            loop.step()
        loop.end_epoch()
    reached, floors = loop.rows[-1]["test"], loop.data.floors
    assert reached["segmentation"]["PAcc"] > floors["segmentation"]["PAcc"] + 10
    assert reached["segmentation"]["mIoU"] > 2 * floors["segmentation"]["mIoU"]

"""What NYUv2 and Cityscapes share: hashes, splits and floors, networks, scales from scratch."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from dbmtl.benchmarks import dense_benchmark as module
from dbmtl.benchmarks.base import Scale, adam, get_benchmark, step_decay
from dbmtl.benchmarks.dense_benchmark import (
    RUN_OPTIONS,
    SCRATCH,
    Images,
    cut_validation,
    dense_benchmark,
    dense_data,
    dense_network,
    generated_hash,
    prepared_hash,
    stores_hash,
    with_scratch,
)
from dbmtl.benchmarks.dense_prediction import dense_floors, dense_tasks
from dbmtl.data.image_store import Store
from dbmtl.data.scenes import STREET_DEPTH_UNIT, streets
from dbmtl.models.deeplab import DeepLab
from dbmtl.models.segnet import SegNet
from dbmtl.models.soft_sharing import CrossStitch

SIZE = (16, 32)
TINY = Scale(
    epochs=1,
    batch_size=4,
    width=2,
    train_size=5,
    eval_size=3,
    extra={"source": "generated", "size": list(SIZE), "weights": "none"},
)
TASKS = dense_tasks(("segmentation", "depth"), classes=7, unit="")


def with_extra(scale, **extra):
    return replace(scale, extra=scale.extra | extra)


def stores(train="a", test="b"):
    return {"train": Store(None, {}, {}, train), "test": Store(None, {}, {}, test)}


def damaged():
    raise ValueError("damaged")


def missing():
    raise FileNotFoundError("missing")


# ------------------------------------------------------------------------------------------ hashes


@pytest.mark.parametrize("name, kind, start", [
    ("cityscapes", "streets", "d5989134"), ("nyuv2", "rooms", "c96cfd25")])  # fmt: skip
def test_hashes_of_generated_images_are_pinned_since_records_hold_them(name, kind, start):
    scale = get_benchmark(name).scale("generated")
    assert generated_hash(kind, scale).startswith(start)
    assert get_benchmark(name).data_hash(scale, 0) == generated_hash(kind, scale)


def test_hash_of_stores_depends_on_both_parts():
    hashes = [stores(), stores(train="c"), stores(test="c"), stores("b", "a")]
    assert len({stores_hash(parts) for parts in hashes}) == 4


def test_hash_of_prepared_images_follows_their_sources():
    assert prepared_hash(stores, stores) == stores_hash(stores())
    assert prepared_hash(stores, lambda: stores(train="new")) == stores_hash(stores(train="new"))


@pytest.mark.parametrize(
    "open_prepared, prepare",
    [(lambda: None, missing), (damaged, missing), (stores, missing)],
    ids=["not prepared", "damaged", "no sources"],
)
def test_hash_is_none_where_it_cannot_be_told(open_prepared, prepare):
    assert prepared_hash(open_prepared, prepare) is None


def test_asking_for_the_hash_prepares_nothing():
    assert prepared_hash(lambda: None, lambda: pytest.fail("prepared")) is None
    with pytest.raises(ValueError, match="damaged"):  # sources that cannot be read are no answer
        prepared_hash(stores, damaged)


# ------------------------------------------------------------------------------------------ splits


@pytest.fixture(scope="module")
def images():
    parts = {"train": streets(5, SIZE, 1), "test": streets(3, SIZE, 2)}
    return Images(parts, STREET_DEPTH_UNIT, "the hash", "generated streets")


def test_data_hold_the_images_their_hash_and_a_note(images):
    data = dense_data(images, TASKS, TINY, inverse_depth=True)
    assert (len(data.train), len(data.validation), len(data.test)) == (3, 2, 3)
    assert data.hash == "the hash"
    assert data.note == (
        "generated streets, 3 + 3 images at 16x32, "
        "2 more cut from the training part to choose the epoch"
    )
    assert data.train.inverse_depth and data.test.inverse_depth
    targets = data.test.batch(torch.arange(3))[1]
    assert list(targets) == ["segmentation", "depth"]
    assert_close(targets["segmentation"], images.parts["test"]["label"], rtol=0, atol=0)


def test_only_training_images_are_augmented_and_floors_are_not(images):
    plain = dense_data(images, TASKS, TINY)
    augmented = dense_data(images, TASKS, with_extra(TINY, augment=True))
    assert not plain.train.augment
    assert augmented.train.augment
    assert not augmented.validation.augment and not augmented.test.augment
    assert augmented.floors == plain.floors == dense_floors(TASKS, plain.train, plain.test)
    assert plain.floors_validation == dense_floors(TASKS, plain.train, plain.validation)


@pytest.mark.parametrize(
    ("size", "batch_size", "validation"),
    [
        (795, 8, 80),  # NYUv2: a tenth
        (795, 2, 80),
        (2975, 64, 298),  # Cityscapes
        (240, 8, 24),
        (400, 8, 40),
        (64, 8, 8),  # a batch is more than a tenth
        (12, 4, 4),
        (5, 4, 2),  # at most half
        (2, 4, 1),
    ],
)
def test_a_validation_part_is_a_tenth_at_least_a_batch_at_most_half(size, batch_size, validation):
    stay, chosen = cut_validation(size, batch_size)
    assert len(chosen) == validation
    assert sorted([*stay.tolist(), *chosen.tolist()]) == list(range(size))
    assert stay.tolist() == sorted(stay.tolist()) and chosen.tolist() == sorted(chosen.tolist())


def test_a_validation_part_is_the_same_whatever_the_process_drew_before():
    torch.manual_seed(1)
    first = cut_validation(240, 8)
    torch.manual_seed(2)
    assert all(map(torch.equal, first, cut_validation(240, 8)))
    assert first[1][:4].tolist() != [0, 1, 2, 3]


def test_a_single_image_cannot_be_divided():
    with pytest.raises(ValueError, match="1 training images cannot be divided"):
        cut_validation(1, 8)


def test_training_and_validation_images_are_those_of_the_training_part(images):
    data = dense_data(images, TASKS, TINY)
    labels = images.parts["train"]["label"]
    for split, rows in ((data.train, [1, 2, 3]), (data.validation, [0, 4])):
        targets = split.batch(torch.arange(len(rows)))[1]
        assert_close(targets["segmentation"], labels[rows], rtol=0, atol=0)


# ----------------------------------------------------------------------------------------- network


def test_every_backbone_gets_imagenet_weights_once_noted(monkeypatch):
    backbones = []
    monkeypatch.setattr(
        module, "load_imagenet", lambda backbone, name: backbones.append(backbone) or f"{name}.pth"
    )
    scale = with_extra(TINY, weights="imagenet")
    network = dense_network(CrossStitch, {"a": 1, "b": 2}, scale)
    assert backbones == list(network.backbones)
    assert network.notes == ["resnet50.pth", "width 2 instead of 64"]


def test_notes_name_what_departs_from_the_paper():
    assert dense_network(DeepLab, {"a": 1}, TINY).notes == [SCRATCH, "width 2 instead of 64"]
    assert dense_network(SegNet, {"a": 1}, TINY).notes == ["width 2 instead of 64"]
    with torch.device("meta"):
        assert dense_network(DeepLab, {"a": 1}, replace(TINY, width=64)).notes == [SCRATCH]


def test_unknown_weights_and_networks_without_backbone_are_refused():
    with pytest.raises(ValueError, match="weights must be one of .* got 'random'"):
        dense_network(DeepLab, {"a": 1}, with_extra(TINY, weights="random"))
    with pytest.raises(ValueError, match="SegNet has no ResNet"):
        dense_network(SegNet, {"a": 1}, with_extra(TINY, weights="imagenet"))


def test_options_of_running_are_passed_on(monkeypatch):
    monkeypatch.setattr(module, "efficient", lambda network, **options: options)
    options = dict.fromkeys(RUN_OPTIONS, True)
    assert dense_network(DeepLab, {"a": 1}, with_extra(TINY, augment=True, **options)) == options
    assert dense_network(DeepLab, {"a": 1}, TINY) == {}


# ----------------------------------------------------------------------------------- the benchmark


def test_scales_from_scratch_come_after_the_others():
    pretrained = with_extra(TINY, weights="imagenet")
    scales = with_scratch({"paper": pretrained, "smoke": TINY})
    assert list(scales) == ["paper", "smoke", "paper-scratch"]
    assert scales["paper"] == pretrained and scales["paper-scratch"] == scales["smoke"] == TINY


def test_benchmarks_share_their_training_settings():
    benchmark = dense_benchmark("name", TASKS, {"smoke": TINY}, "load", "network", "hash")
    assert benchmark.optimizer is adam and benchmark.scheduler is step_decay
    assert benchmark.drop_last and not benchmark.multi_input and benchmark.schedule_on == "epoch"
    assert (benchmark.load, benchmark.network, benchmark.data_hash) == ("load", "network", "hash")
    assert "a tenth of the training part" in benchmark.note
    assert benchmark.protocol == 2

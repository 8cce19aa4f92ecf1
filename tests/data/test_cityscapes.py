"""Cityscapes from made-up folders in both layouts: what is read, what is refused, what is named."""

import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from dbmtl.data.cityscapes import (
    CATEGORIES,
    DEPTH_UNIT,
    category_labels,
    find_cityscapes,
    image_bytes,
    inverse_depth,
    prepare_cityscapes,
)

# the publisher's table, id by id
OFFICIAL = {
    "void": [
        "unlabeled",
        "ego vehicle",
        "rectification border",
        "out of roi",
        "static",
        "dynamic",
        "ground",
    ],
    "flat": ["road", "sidewalk", "parking", "rail track"],
    "construction": ["building", "wall", "fence", "guard rail", "bridge", "tunnel"],
    "object": ["pole", "polegroup", "traffic light", "traffic sign"],
    "nature": ["vegetation", "terrain"],
    "sky": ["sky"],
    "human": ["person", "rider"],
    "vehicle": ["car", "truck", "bus", "caravan", "trailer", "train", "motorcycle", "bicycle"],
}
SIZE = (8, 16)
KEYS = {
    "train": ["aachen_000000_000019", "aachen_000001_000019", "ulm_000002_000019"],
    "val": ["lindau_000000_000019"],
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path / "data"))
    return tmp_path / "cache"


def samples():
    "{part: [(image uint8 [H, W, 3], official ids [H, W], disparity PNG values [H, W])]}"
    random = np.random.default_rng(7)
    parts = {}
    for part, keys in KEYS.items():
        parts[part] = []
        for _ in keys:
            image = random.integers(0, 256, (*SIZE, 3), np.uint8)
            ids = random.integers(0, 34, SIZE).astype(np.uint8)
            disparity = random.integers(0, 32258, SIZE).astype(np.uint16)
            parts[part].append((image, ids, disparity))
    return parts


@pytest.fixture
def official(tmp_path):
    for part, keys in KEYS.items():
        for key, (image, ids, disparity) in zip(keys, samples()[part], strict=True):
            for folder, ending, array in (
                ("leftImg8bit", "leftImg8bit", image),
                ("gtFine", "gtFine_labelIds", ids),
                ("gtFine", "gtFine_labelTrainIds", 0 * ids),
                ("disparity", "disparity", disparity),
            ):
                city = key.split("_")[0]
                file = tmp_path / "official" / folder / part / city / f"{key}_{ending}.png"
                file.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(file)
    return tmp_path / "official"


@pytest.fixture
def mtan(tmp_path):
    "The same samples as the archive would hold them."
    for part in KEYS:
        for n, (image, ids, disparity) in enumerate(samples()[part]):
            label = category_labels(ids).astype(np.float64)
            label[label == 255] = -1
            for kind, array in (
                ("image", (image / 255).astype(np.float32)),
                ("label_7", label),
                ("depth", disparity[..., None] / 65535),
            ):
                # 9, 10, 11: order by number, not by text
                file = tmp_path / "mtan" / part / kind / f"{n + 9}.npy"
                file.parent.mkdir(parents=True, exist_ok=True)
                np.save(file, array)
    return tmp_path / "mtan"


def assert_equal(first, second):
    assert_close(first, second, rtol=0, atol=0)


def test_cityscapes_label_ids_follow_the_published_table():
    names = [category for category, members in OFFICIAL.items() for _ in members]
    labels = category_labels(np.arange(34, dtype=np.uint8))
    assert len(names) == 34
    assert ["void" if k == 255 else CATEGORIES[k] for k in labels] == names
    assert labels.dtype == np.uint8
    with pytest.raises(ValueError, match="label id 255"):
        category_labels(np.array([3, 255], np.uint8))


def test_cityscapes_both_layouts_give_the_same_arrays(official, mtan):
    one = prepare_cityscapes(official, SIZE)
    other = prepare_cityscapes(mtan, SIZE)
    for part, name in (("train", "train"), ("test", "val")):
        assert len(one[part]) == len(KEYS[name])
        assert_equal(one[part].arrays, other[part].arrays)
        image, ids, disparity = (np.stack(x) for x in zip(*samples()[name], strict=True))
        assert_equal(one[part].arrays["image"], torch.tensor(image).permute(0, 3, 1, 2))
        assert np.array_equal(one[part].arrays["label"].numpy() == 255, ids < 7)
        assert np.array_equal(one[part].arrays["depth"].numpy(), disparity)
    assert one["train"].meta["layout"] == "official" and other["train"].meta["layout"] == "mtan"
    assert {x.arrays["depth"].dtype for x in one.values()} == {torch.int16}
    assert len({store.hash for stores in (one, other) for store in stores.values()}) == 4


def test_cityscapes_resizing_blends_colors_but_neither_labels_nor_depths(official, mtan):
    (_, ids, disparity), size = samples()["train"][1], (4, 8)
    for folder in (official, mtan):
        store = prepare_cityscapes(folder, size)["train"]
        label = store.arrays["label"][1].numpy()
        depth = store.arrays["depth"][1].numpy()
        for y in range(4):
            for x in range(8):
                square = np.s_[2 * y : 2 * y + 2, 2 * x : 2 * x + 2]
                pairs = zip(
                    category_labels(ids[square]).ravel(), disparity[square].ravel(), strict=True
                )
                # one and the same pixel of the square
                assert (label[y, x], depth[y, x]) in set(pairs)
        mean = samples()["train"][1][0].reshape(4, 2, 8, 2, 3).mean((1, 3)).transpose(2, 0, 1)
        assert abs(store.arrays["image"][1].numpy() - mean).max() <= 1


def test_cityscapes_second_call_reads_no_image_and_the_cache_alone_is_enough(
    official, tmp_path, monkeypatch
):
    source = tmp_path / "data" / "cityscapes"
    shutil.copytree(official, source)
    first = prepare_cityscapes(size=SIZE)
    with monkeypatch.context() as patch:
        name = "dbmtl.data.cityscapes.read_official"
        patch.setattr(name, lambda item, size: pytest.fail(item.key))
        assert prepare_cityscapes(size=SIZE)["test"].hash == first["test"].hash
    shutil.rmtree(source)
    assert prepare_cityscapes(size=SIZE)["train"].hash == first["train"].hash
    with pytest.raises(FileNotFoundError, match="disparity_trainvaltest.zip"):
        prepare_cityscapes(size=(4, 8))  # never prepared
    with pytest.raises(FileNotFoundError, match="Cityscapes is not in"):
        prepare_cityscapes(source, SIZE)  # asked for by name


def test_cityscapes_names_every_missing_file_at_once(official, mtan, cache):
    (official / "gtFine/train/aachen/aachen_000001_000019_gtFine_labelIds.png").unlink()
    lindau = official / "disparity/val/lindau"
    old, new = "lindau_000000_000019_disparity.png", "lindau_000009_000019_disparity.png"
    (lindau / old).rename(lindau / new)
    with pytest.raises(FileNotFoundError) as caught:
        prepare_cityscapes(official, SIZE)
    for sentence in (
        "train aachen_000001_000019 has no label;",
        "val lindau_000000_000019 has no depth;",
        "val lindau_000009_000019 has no image and no label.",
    ):
        assert sentence in str(caught.value)
    shutil.rmtree(mtan / "val" / "label_7")
    (mtan / "train" / "image" / "10.npy").unlink()
    with pytest.raises(FileNotFoundError, match="train 10 has no image; val has no label files"):
        find_cityscapes(mtan)
    assert not cache.exists()


def test_cityscapes_accepts_label_and_label_7(mtan):
    prepared = prepare_cityscapes(mtan, SIZE)["train"].arrays["label"].clone()
    for part in KEYS:
        (mtan / part / "label_7").rename(mtan / part / "label")
    layout, parts = find_cityscapes(mtan)
    keys = [item.key for item in parts["train"]]
    assert layout == "mtan" and keys == ["train/9", "train/10", "train/11"]
    assert_equal(prepare_cityscapes(mtan, SIZE)["train"].arrays["label"], prepared)


def test_cityscapes_names_every_corrupt_file_at_once(mtan, official):
    (mtan / "train/depth/9.npy").write_bytes(b"\x93NUMPY")
    np.save(mtan / "train/label_7/10.npy", np.full(SIZE, 18.0))  # the set with 19 classes
    np.save(mtan / "train/depth/11.npy", np.full(SIZE, 25.0))  # meters
    with pytest.raises(ValueError) as caught:
        prepare_cityscapes(mtan, SIZE)
    for part in ("3 of 3", "train/9:", "train/10: the labels", "train/11: the depth reaches 25"):
        assert part in str(caught.value)
    file = official / "disparity/train/ulm/ulm_000002_000019_disparity.png"
    Image.fromarray(np.zeros(SIZE, np.uint8)).save(file)
    aachen = official / "leftImg8bit/train/aachen"
    (aachen / "aachen_000000_000019_leftImg8bit.png").write_bytes(b"\x89PNG")
    both = "(?s)aachen_000000_000019_leftImg8bit.png.*ulm_000002_000019_disparity.png"
    with pytest.raises(ValueError, match=both):
        prepare_cityscapes(official, SIZE)
    Image.fromarray(np.full((4, 4), 9000, np.uint16)).save(
        official / "disparity/val/lindau/lindau_000000_000019_disparity.png"
    )
    with pytest.raises(ValueError, match=f"{both}.*val/lindau.* differ in size"):
        prepare_cityscapes(official, SIZE)  # the wrong ones of both parts in one error


@pytest.mark.parametrize("bad", [np.nan, np.inf, -0.1, 1.5])
def test_cityscapes_refuses_images_outside_the_unit_interval(bad):
    image = np.full((2, 2, 3), 0.5)
    image[1, 0, 2] = bad
    with pytest.raises(ValueError, match="0 to 1"):
        image_bytes(image)


def test_cityscapes_images_are_rounded_to_the_nearest_byte():
    image = np.array([[[0.4, 0.6, 254.6]]]) / 255
    assert image_bytes(image).ravel().tolist() == [0, 1, 255]


def test_cityscapes_depth_keeps_zero_disparity_apart_from_invalid():
    values = np.arange(32768) / 65535  # float64, and as an archive in float32 would hold it
    for given in (values, values.astype(np.float32)):
        assert np.array_equal(inverse_depth(given), np.arange(32768))
    assert inverse_depth(np.array([-1.0, 0.0, 1e-9])).tolist() == [0, 0, 1]
    assert round(32257 * DEPTH_UNIT, 4) == 0.4922  # what the users of the archive report
    with pytest.raises(ValueError, match="not finite"):
        inverse_depth(np.array([0.1, np.nan]))

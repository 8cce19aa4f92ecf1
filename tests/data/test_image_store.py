"""Prepared image sets: resizing, reading, building, what is refused, what interruptions leave."""

import gc
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image
from torch.testing import assert_close

from dbmtl.core.files import cache_folder, file_lock
from dbmtl.data import image_store
from dbmtl.data.image_store import (
    Item,
    area,
    build_store,
    encode_depth,
    encode_normal,
    nearest,
    open_store,
    read_array,
    read_image,
)

ROOT = Path(__file__).resolve().parents[2]
FIELDS = {"value": ((2, 3), np.uint8), "number": ((), np.int64)}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def items(tmp_path):
    return make_items(tmp_path / "sources", 5)


def make_items(folder, count):
    folder.mkdir()
    for n in range(count):
        (folder / f"{n}.bin").write_bytes(bytes(range(n, n + 6)))
    return [Item(f"item{n}", (folder / f"{n}.bin",), {"n": n}) for n in range(count)]


class Reader:
    """Reads the files of `make_items` and remembers which."""

    def __init__(self):
        self.calls = []

    def __call__(self, item):
        self.calls.append(item.key)
        value = np.frombuffer(item.files[0].read_bytes(), np.uint8)
        return {"value": value.reshape(2, 3), "number": np.array(item.label["n"])}


def leftovers(cache):
    return sorted(path.name for path in cache.glob(".*") if path.suffix != ".lock")


# ----------------------------------------------------------------------------------------- resizing


def overlap(scale, new, old):
    """What a new pixel's interval and an old one's have in common."""
    return max(min((new + 1) * scale, old + 1) - max(new * scale, old), 0)


def slow_area(array, size):
    """The mean over each area in exact fractions, pixel by pixel."""
    (height, width), (h, w) = array.shape, size
    out = np.zeros(size)
    for i in range(h):
        for j in range(w):
            total = Fraction(0)
            for k in range(height):
                for m in range(width):
                    tall = overlap(Fraction(height, h), i, k)
                    wide = overlap(Fraction(width, w), j, m)
                    total += tall * wide * int(array[k, m])
            out[i, j] = float(total * h * w / (height * width))
    return out


pictures = hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=7))
sizes = st.tuples(st.integers(1, 9), st.integers(1, 9))


@settings(deadline=None, max_examples=60)
@given(pictures, sizes)
def test_image_store_area_is_the_mean_over_areas(array, size):
    assert np.abs(area(array, size) - slow_area(array, size)).max() <= 0.501  # rounded to a level


@settings(deadline=None, max_examples=60)
@given(pictures, sizes)
def test_image_store_nearest_takes_the_center(array, size):
    height, width = array.shape
    resized = nearest(array, size)
    for i in range(size[0]):
        for j in range(size[1]):
            row = Fraction(2 * i + 1, 2 * size[0]) * height
            column = Fraction(2 * j + 1, 2 * size[1]) * width
            assert resized[i, j] == array[int(row), int(column)]


def test_image_store_resizing_keeps_leading_dimensions_and_types():
    array = np.random.default_rng(0).integers(0, 256, (2, 3, 8, 12), dtype=np.uint8)
    blocks = array.reshape(2, 3, 4, 2, 4, 3).mean((3, 5))
    assert np.abs(area(array, (4, 4)) - blocks).max() <= 0.501
    assert area(array, (4, 4)).dtype == np.uint8
    assert nearest(array.astype(np.int16), (4, 4)).dtype == np.int16
    assert_close(nearest(array, (4, 4)), array[..., 1::2, 1::3])
    assert area(array, (8, 12)) is array


# ------------------------------------------------------------------------------------------ reading


def test_image_store_reads_colors_of_any_kind(tmp_path):
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    suffixes = {"RGB": "png", "L": "png", "RGBA": "png", "P": "png", "CMYK": "jpg"}
    for mode, suffix in suffixes.items():
        path = tmp_path / f"{mode}.{suffix}"
        converted = picture.convert(mode)
        converted.save(path, quality=95)
        image = read_image(path)
        assert image.shape == (3, 6, 8) and image.dtype == np.uint8 and image.flags.c_contiguous
        if suffix == "png":
            assert (image.transpose(1, 2, 0) == np.asarray(converted.convert("RGB"))).all()


@pytest.mark.parametrize("size", [(3, 4), (4, 5), (3, 5), (12, 3), (1, 1), (9, 15)])
def test_image_store_reading_agrees_with_area(tmp_path, size):
    array = np.random.default_rng(0).integers(0, 256, (3, 9, 15), dtype=np.uint8)
    Image.fromarray(array.transpose(1, 2, 0)).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", size)
    assert image.shape == (3, *size)
    assert np.abs(image.astype(int) - area(array, size)).max() <= 1
    assert (read_image(tmp_path / "a.png", size, resize="nearest") == nearest(array, size)).all()


def test_image_store_bilinear_is_antialiased(tmp_path):
    stripes = np.zeros((8, 64, 3), np.uint8)
    stripes[:, ::2] = 255
    Image.fromarray(stripes).save(tmp_path / "a.png")
    image = read_image(tmp_path / "a.png", (8, 8), resize="bilinear")
    assert np.abs(image.astype(int) - 127.5).max() < 10


def test_image_store_labels_keep_their_numbers(tmp_path):
    labels = np.array([[0, 1, 2, 255], [12, 11, 10, 9]], np.uint8)
    Image.fromarray(labels).save(tmp_path / "gray.png")
    palette = Image.frombytes("P", (4, 2), labels.tobytes())
    palette.putpalette([255 - n // 3 for n in range(768)])
    palette.save(tmp_path / "palette.png")
    wide = (labels.astype(np.uint16) * 257).astype(np.uint16)
    Image.fromarray(wide).save(tmp_path / "wide.png")
    for name in ("gray", "palette"):
        assert (read_image(tmp_path / f"{name}.png", mode="L") == labels).all()
    assert (read_image(tmp_path / "gray.png", (2, 2), "L") == labels[:, 1::2]).all()
    assert (read_image(tmp_path / "wide.png", mode="I;16") == wide).all()
    assert read_image(tmp_path / "wide.png", mode="I;16").dtype == np.uint16


def test_image_store_reading_errors_name_the_file(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "whole.jpg")
    whole = (tmp_path / "whole.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.png").write_text("not an image")
    Image.fromarray(noise).save(tmp_path / "color.png")
    for name in ("cut.jpg", "text.png"):
        with pytest.raises(ValueError, match=name):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match="color.png: stored as RGB, not L"):
        read_image(tmp_path / "color.png", mode="L")
    with pytest.raises(FileNotFoundError, match="gone.png"):
        read_image(tmp_path / "gone.png")
    message = r"resize must be one of \['area', 'bilinear', 'nearest'\], got 'cubic'"
    with pytest.raises(ValueError, match=message):
        read_image(tmp_path / "color.png", (2, 2), resize="cubic")


def test_image_store_without_pillow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(ImportError, match=r"pip install dbmtl\[images\]"):
        read_image(tmp_path / "a.png")


@pytest.fixture
def switch_in_collections():
    """Threads take turns within every collection of garbage: where Python 3.11 can leave a parser.
    Hypothesis, for one, runs Python code there."""
    threshold = gc.get_threshold()

    def let_others_run(phase, info):
        time.sleep(0)

    gc.set_threshold(3)
    gc.callbacks.append(let_others_run)
    yield
    gc.callbacks.remove(let_others_run)
    gc.set_threshold(*threshold)


def test_image_store_reads_arrays_in_several_threads(tmp_path, switch_in_collections):
    """A SystemError of the parser of headers, seldom, looked like a file that cannot be used."""
    path = tmp_path / "a.npy"
    np.save(path, np.ones((2, 3)))
    both = threading.Barrier(2, timeout=60)

    def read_often(_):
        both.wait()
        return {read_array(path).shape for _ in range(200)}

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(read_often, range(2))) == [{(2, 3)}, {(2, 3)}]


@pytest.mark.full
def test_image_store_is_imported_without_pillow():
    code = "import sys, dbmtl.data.image_store; assert 'PIL' not in sys.modules"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True, cwd=ROOT)


# -------------------------------------------------------------------------------- depth and normals


@settings(deadline=None, max_examples=60)
@given(hnp.arrays(np.float64, (3, 4), elements=st.floats(0, 16)))
def test_image_store_depth_is_within_half_a_unit(depth):
    steps = encode_depth(depth, 0.0005)
    assert steps.dtype == np.int16 and ((steps == 0) == (depth == 0)).all()
    far = depth >= 0.0005  # nearer ones become one unit: 0 would say unknown
    assert np.abs(steps * 0.0005 - depth)[far].max(initial=0) <= 0.00025 + 1e-12


@pytest.mark.parametrize("value", [-0.1, 16.4, np.nan, np.inf])
def test_image_store_depth_out_of_range_is_an_error(value):
    with pytest.raises(ValueError, match="depth from"):
        encode_depth(np.array([[1.0, value]]), 0.0005)


def test_image_store_normals_keep_their_direction():
    vectors = np.random.default_rng(0).standard_normal((3, 100, 100)) * np.geomspace(0.01, 100, 100)
    vectors[:, 0, 0] = 0
    coded = encode_normal(vectors)
    assert coded.dtype == np.int8 and not coded[:, 0, 0].any() and np.abs(coded).max() <= 127
    decoded = torch.from_numpy(coded).double()
    cosine = torch.cosine_similarity(torch.from_numpy(vectors), decoded, dim=0)
    assert cosine.flatten()[1:].min() > np.cos(np.radians(0.4))
    with pytest.raises(ValueError, match="not finite"):
        encode_normal(np.full((3, 1, 1), np.nan))


# ----------------------------------------------------------------------------------------- building


def test_image_store_holds_what_was_read(items):
    store = build_store("set", items, Reader(), FIELDS, meta={"unit": 0.1})
    assert len(store) == 5
    assert store.keys == tuple(f"item{n}" for n in range(5))
    assert store.meta == {"unit": 0.1}
    assert store.folder == cache_folder() / "set"
    expected = torch.arange(6).reshape(2, 3) + torch.arange(5)[:, None, None]
    assert_close(store.arrays["value"], expected.to(torch.uint8))
    assert_close(store.arrays["number"], torch.arange(5))
    assert_close(np.load(store.folder / "value.npy"), expected.numpy().astype(np.uint8))


def test_image_store_order_is_kept_over_many_chunks(tmp_path):
    items = make_items(tmp_path / "many", 200)
    store = build_store("set", items, Reader(), FIELDS)
    assert_close(store.arrays["number"], torch.arange(200))


def test_image_store_second_call_reads_nothing(items, monkeypatch):
    first = build_store("set", items, Reader(), FIELDS)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail("hashed again"))
    reader = Reader()
    assert build_store("set", items, reader, FIELDS).hash == first.hash
    assert reader.calls == []


def test_image_store_is_built_again_when_anything_changes(items):
    def calls(items=items, fields=FIELDS, meta=None):
        reader = Reader()
        store = build_store("set", items, reader, fields, meta)
        return len(reader.calls), store.hash

    number, first = calls()
    assert number == 5 and calls() == (0, first)
    os.utime(items[2].files[0], ns=(1, 1))
    assert calls() == (5, first)  # read again, and found to be the same
    hashes = {first}
    stat = items[2].files[0].stat()
    items[2].files[0].write_bytes(b"sizes!")  # of the same size
    os.utime(items[2].files[0], ns=(1, stat.st_mtime_ns + 1))
    number, second = calls()
    assert number == 5 and second != first
    hashes.add(second)
    for change in (
        {"meta": {"unit": 2}},
        {"items": items[:4]},
        {"items": items[::-1]},
        {"items": [Item("renamed", items[0].files, items[0].label), *items[1:]]},
        {"items": [Item(items[0].key, items[0].files, {"n": 9}), *items[1:]]},
    ):
        calls()
        number, digest = calls(**change)
        assert number == len(change.get("items", items)) and digest not in hashes, change
        hashes.add(digest)


def test_image_store_hash_is_that_of_the_sources(tmp_path):
    first = build_store("set", make_items(tmp_path / "one", 3), Reader(), FIELDS, {"a": 1})
    second = build_store("other", make_items(tmp_path / "two", 3), Reader(), FIELDS, {"a": 1})
    assert first.hash == second.hash  # neither the folder nor the store's name is part of it
    fields = {"number": [[], "<i8"], "value": [[2, 3], "|u1"]}
    digest = hashlib.sha256(json.dumps([fields, {"a": 1}], sort_keys=True).encode())
    for n in range(3):
        digest.update(json.dumps([f"item{n}", {"n": n}]).encode())
        digest.update(hashlib.sha256(hashlib.sha256(bytes(range(n, n + 6))).digest()).digest())
    assert digest.hexdigest() == first.hash


def test_image_store_files_cannot_be_changed_through_it(items):
    store = build_store("set", items, Reader(), FIELDS)
    store.arrays["value"].fill_(99)
    assert open_store("set").arrays["value"][0, 0, 0] == 0


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs /proc")
def test_image_store_costs_no_memory_on_the_cpu(tmp_path):
    items = make_items(tmp_path / "big", 16)
    rows = {"value": ((1 << 22,), np.uint8)}

    def read(item):
        return {"value": np.full(1 << 22, item.label["n"], np.uint8)}

    store = build_store("big", items, read, rows)
    assert (store.folder / "value.npy").stat().st_size > 64e6

    def anonymous():  # resident pages that are not a file's
        _, resident, shared, *_ = map(int, Path("/proc/self/statm").read_text().split())
        return (resident - shared) * os.sysconf("SC_PAGE_SIZE")

    before = anonymous()
    opened = open_store("big")
    total = sum(int(opened.arrays["value"][row].sum()) for row in range(16))
    assert total == (1 << 22) * sum(range(16))
    assert anonymous() - before < 16e6


@pytest.mark.cuda
def test_image_store_moves_to_a_gpu(items):
    store = build_store("set", items, Reader(), FIELDS)
    moved = store.to("cuda")
    assert all(array.is_cuda for array in moved.arrays.values()) and moved.hash == store.hash
    assert_close(moved.arrays["value"].cpu(), store.arrays["value"])


def test_image_store_shows_a_bar_where_asked(items, capfd):
    build_store("quiet", items, Reader(), FIELDS)
    assert capfd.readouterr().err == ""
    build_store("loud", items, Reader(), FIELDS, progress=True)
    assert "5/5" in capfd.readouterr().err


def test_image_store_works_without_tqdm(items, monkeypatch):
    monkeypatch.setitem(sys.modules, "tqdm", None)
    assert len(build_store("set", items, Reader(), FIELDS, progress=True)) == 5


# ----------------------------------------------------------------------------------------- refusing


def spoil(folder):
    """Images of which six cannot be used, each in its own way, and one can."""
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)
    names = ["good", "cut", "gone", "empty", "shape", "range", "text"]
    for name in names:
        Image.fromarray(noise).save(folder / f"{name}.jpg")
        Image.fromarray(np.zeros((16, 16), np.uint8)).save(folder / f"{name}.png")
    whole = (folder / "cut.jpg").read_bytes()
    (folder / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (folder / "gone.jpg").unlink()
    (folder / "empty.jpg").write_bytes(b"")
    Image.fromarray(noise[:8]).save(folder / "shape.jpg")
    Image.fromarray(np.full((16, 16), 40, np.uint8)).save(folder / "range.png")
    (folder / "text.png").write_text("text")
    return [Item(name, (folder / f"{name}.jpg", folder / f"{name}.png")) for name in names]


def read_spoiled(item):
    label = read_image(item.files[1], mode="L")
    if label.max() > 12:
        raise ValueError(f"{item.files[1]}: label {label.max()}")
    return {"image": read_image(item.files[0]), "label": label}


IMAGES = {"image": ((3, 16, 16), np.uint8), "label": ((16, 16), np.uint8)}


def test_image_store_names_every_wrong_file_in_one_error(tmp_path, cache):
    with pytest.raises(ValueError) as caught:
        build_store("set", spoil(tmp_path / "spoiled"), read_spoiled, IMAGES)
    head, *lines = str(caught.value).splitlines()
    assert head == "set: 6 of 7 samples cannot be used:"
    keys = [line.split(":")[0] for line in lines]
    assert keys == ["cut", "gone", "empty", "shape", "range", "text"]
    details = ["cut.jpg", "gone.jpg", "empty.jpg", "[3, 8, 16]", "range.png", "text.png"]
    assert [detail for detail, line in zip(details, lines, strict=True) if detail not in line] == []
    assert open_store("set") is None and leftovers(cache) == []


def test_image_store_names_twenty_and_counts_the_rest(tmp_path):
    items = make_items(tmp_path / "many", 25)
    for item in items[:23]:
        item.files[0].unlink()
    with pytest.raises(ValueError) as caught:
        build_store("set", items, Reader(), FIELDS)
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("set: 23 of 25")
    assert len(lines) == 22 and lines[-1] == "... and 3 more"


def test_image_store_made_again_leaves_nothing_of_the_old_one(items, cache):
    build_store("set", items, Reader(), FIELDS)
    build_store("set", items[:4], Reader(), FIELDS)
    assert len(open_store("set")) == 4 and leftovers(cache) == []


def test_image_store_can_be_read_by_others(items, cache):
    """A shared cache: a temporary folder would be its owner's alone."""
    build_store("set", items, Reader(), FIELDS)
    assert (cache / "set").stat().st_mode & 0o777 == 0o755


def test_image_store_keeps_the_old_one_when_the_new_one_fails(items):
    first = build_store("set", items, Reader(), FIELDS)
    items[0].files[0].write_bytes(b"short")
    with pytest.raises(ValueError, match="item0"):
        build_store("set", items, Reader(), FIELDS)
    assert open_store("set").hash == first.hash


@pytest.mark.parametrize(
    ("result", "words"),
    [
        ({"value": np.zeros((2, 3), np.uint8)}, r"fields \['value'\], not \['number', 'value'\]"),
        (
            {"value": np.zeros((2, 3)), "number": np.array(1)},
            r"value is float64 \[2, 3\], not uint8 \[2, 3\]",
        ),
        (
            {"value": np.zeros((3, 2), np.uint8), "number": np.array(1)},
            r"uint8 \[3, 2\], not uint8 \[2, 3\]",
        ),
    ],
)
def test_image_store_holds_readers_to_their_fields(items, result, words):
    with pytest.raises(ValueError, match=words):
        build_store("set", items, lambda item: result, FIELDS)


def test_image_store_missing_package_is_no_corrupt_file(items, cache):
    def read(item):
        raise ImportError("pip install it")

    with pytest.raises(ImportError, match="pip install it"):
        build_store("set", items, read, FIELDS)
    assert leftovers(cache) == []


def test_image_store_refuses_empty_twice_named_and_nested(items):
    with pytest.raises(ValueError, match="no samples"):
        build_store("set", [], Reader(), FIELDS)
    with pytest.raises(ValueError, match="one key"):
        build_store("set", [items[0], items[0]], Reader(), FIELDS)
    with pytest.raises(ValueError, match="a/b"):
        build_store("a/b", items, Reader(), FIELDS)


def free_bytes(count):
    """In place of `shutil.disk_usage`."""
    return lambda path: shutil._ntuple_diskusage(100, 100 - count, count)


def test_image_store_full_disk_is_said_before_the_work(items, cache, monkeypatch):
    cache.mkdir()
    reader = Reader()
    needed = len(items) * (2 * 3 + 8)
    for free in (1, needed - 1):
        monkeypatch.setattr(shutil, "disk_usage", free_bytes(free))
        with pytest.raises(OSError, match="set needs"):
            build_store("set", items, reader, FIELDS)
    assert reader.calls == [] and leftovers(cache) == []
    monkeypatch.setattr(shutil, "disk_usage", free_bytes(needed))
    assert len(build_store("set", items, reader, FIELDS)) == len(items)


def test_image_store_notices_sources_that_change_meanwhile(items, cache):
    reader = Reader()

    def read(item):
        if item.key == "item3":
            os.utime(items[0].files[0], ns=(5, 5))
        return reader(item)

    with pytest.raises(ValueError, match="changed while being read"):
        build_store("set", items, read, FIELDS)
    assert open_store("set") is None and leftovers(cache) == []


# ------------------------------------------------------------------------------------------- damage


def cut(folder):
    data = (folder / "value.npy").read_bytes()
    (folder / "value.npy").write_bytes(data[:-1])


def header(folder):
    data = (folder / "value.npy").read_bytes()
    (folder / "value.npy").write_bytes(data.replace(b"(5, 2, 3)", b"(5, 3, 2)"))


DAMAGE = {
    "cut": cut,
    "header": header,
    "gone": lambda folder: (folder / "number.npy").unlink(),
    "manifest": lambda folder: (folder / "manifest.json").write_text('{"hash": "'),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_image_store_damage_is_named_and_mended(items, damage):
    store = build_store("set", items, Reader(), FIELDS)
    DAMAGE[damage](store.folder)
    with pytest.raises(ValueError, match="set is damaged"):
        open_store("set")
    reader = Reader()
    assert build_store("set", items, reader, FIELDS).hash == store.hash and len(reader.calls) == 5
    assert_close(open_store("set").arrays["number"], torch.arange(5))


def flip(file, position):
    """One bit of a file, at the same time of change: what a disk does, and no editor."""
    stat = file.stat()
    content = bytearray(file.read_bytes())
    content[position] ^= 1
    file.write_bytes(bytes(content))
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))


OPEN = """
import sys
from dbmtl.data.image_store import open_store
try:
    print(sorted(open_store("set").arrays))
except ValueError as error:
    print(error)
"""


@pytest.mark.parametrize("name", ["value.npy", "number.npy"])
@pytest.mark.parametrize("position", [8, 127, 128, -1])  # in the header, and in the rows
def test_image_store_flipped_bit_is_noticed_and_mended(items, name, position):
    store = build_store("set", items, Reader(), FIELDS)
    flip(store.folder / name, position)
    image_store._intact.clear()  # as in another process
    with pytest.raises(
        ValueError, match=f"set is damaged \\({name}\\): delete .* prepare it again"
    ):
        open_store("set")
    reader = Reader()
    assert build_store("set", items, reader, FIELDS).hash == store.hash and len(reader.calls) == 5
    assert_close(open_store("set").arrays["number"], torch.arange(5))


@pytest.mark.full
def test_image_store_flipped_bit_is_noticed_by_another_process(items):
    store = build_store("set", items, Reader(), FIELDS)
    shown = [subprocess.run([sys.executable, "-c", OPEN], capture_output=True, text=True).stdout]
    flip(store.folder / "value.npy", -1)
    shown += [subprocess.run([sys.executable, "-c", OPEN], capture_output=True, text=True).stdout]
    assert shown[0] == "['number', 'value']\n" and "set is damaged (value.npy)" in shown[1]


def test_image_store_changed_manifest_is_noticed(items):
    store = build_store("set", items, Reader(), FIELDS, {"unit": 0.001})
    path = store.folder / "manifest.json"
    path.write_text(path.read_text().replace("0.001", "0.002"))
    with pytest.raises(ValueError, match="set is damaged .manifest.json"):
        open_store("set")


def test_image_store_is_hashed_once_a_process(items, monkeypatch):
    build_store("set", items, Reader(), FIELDS)
    image_store._intact.clear()
    digest, calls = hashlib.file_digest, []
    monkeypatch.setattr(
        image_store.hashlib, "file_digest", lambda *a: calls.append(a[0].name) or digest(*a)
    )
    for _ in range(3):
        open_store("set")
    assert len(calls) == len(FIELDS)
    path = open_store("set").folder / "value.npy"
    os.utime(path, ns=(5, 5))
    open_store("set")
    assert calls[len(FIELDS) :] == [str(path)]


def test_image_store_of_before_hashes_stays_usable(items):
    store = build_store("set", items, Reader(), FIELDS)
    path = store.folder / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, file in (("value", "value.npy"), ("number", "number.npy")):
        content = (store.folder / file).read_bytes()
        assert manifest["sha256"][name] == hashlib.sha256(content).hexdigest()
    del manifest["sha256"], manifest["checksum"]
    path.write_text(json.dumps(manifest))
    assert open_store("set").hash == store.hash
    reader = Reader()
    build_store("set", items, reader, FIELDS)
    assert reader.calls == []


def test_image_store_without_manifest_is_none(items):
    store = build_store("set", items, Reader(), FIELDS)
    (store.folder / "manifest.json").unlink()
    assert open_store("set") is None
    assert len(build_store("set", items, Reader(), FIELDS)) == 5


# ---------------------------------------------------------------------------------- other processes

SCRIPT = """
import os, signal, sys, time, warnings
from pathlib import Path
import numpy as np
from dbmtl.data import image_store
from dbmtl.data.image_store import Item, build_store
warnings.simplefilter("error")
sys.stderr = open(log + ".err", "a", buffering=1)
os.environ["DBMTL_CACHE"] = cache
items = [Item(f"item{n}", (Path(sources) / f"{n}.bin",), {"n": n}) for n in range(5)]
def die(*args, **named): os.kill(os.getpid(), signal.SIGKILL)
def read(item):
    with open(log, "a") as file: file.write(item.key + " ")
    READ
    value = np.frombuffer(item.files[0].read_bytes(), np.uint8).reshape(2, 3)
    return {"value": value, "number": np.array(item.label["n"])}
PATCH
store = build_store("set", items, read, {"value": ((2, 3), np.uint8), "number": ((), np.int64)})
with open(log + ".out", "a") as file: file.write(store.hash + " ")
"""


def script(read="pass", patch=""):
    return SCRIPT.replace("READ", read).replace("PATCH", patch)


@pytest.fixture(scope="module")
def server():
    """Starts processes of their own that have imported torch already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["dbmtl.data.image_store"])
    return context


@pytest.fixture
def start(server, items, tmp_path, cache):
    def start(code):
        names = {
            "sources": str(items[0].files[0].parent),
            "cache": str(cache),
            "log": str(tmp_path / "log"),
        }
        process = server.Process(target=exec, args=(code, names))
        process.start()
        return process

    return start


SECOND_RENAME = """
real = Path.rename
Path.rename = lambda a, b: real(a, b) if '.old' in str(b) else die()
"""
MOMENTS = {  # when the process is killed, and whether an older store survives it
    "in the first sample": (script("die()"), True),
    "in the last sample": (script("item.label['n'] == 4 and (time.sleep(0.3), die())"), True),
    "in the manifest": (script(patch="image_store.write_atomically = die"), True),
    "before the renames": (script(patch="Path.rename = die"), True),
    "between the renames": (script(patch=SECOND_RENAME), False),
}


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="SIGKILL")
@pytest.mark.parametrize("moment", MOMENTS)
def test_image_store_killed_build_leaves_no_store(start, items, tmp_path, cache, moment):
    code, survives = MOMENTS[moment]
    older = build_store("set", items[:2], Reader(), FIELDS)
    process = start(code)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL, (tmp_path / "log.err").read_text()
    assert leftovers(cache) != []
    left = open_store("set")
    assert left.hash == older.hash and len(left) == 2 if survives else left is None
    reader = Reader()
    store = build_store("set", items, reader, FIELDS)
    assert sorted(reader.calls) == [item.key for item in items] and len(store) == 5
    assert leftovers(cache) == []


@pytest.mark.full
@pytest.mark.skipif(os.name == "nt", reason="file locks")
def test_image_store_two_processes_build_once(start, items, tmp_path):
    ready = "while len(Path(log + '.ready').read_text()) < 2: time.sleep(0.01)\n    time.sleep(0.4)"
    both = [
        start(script(ready, "with open(log + '.ready', 'a') as file: file.write('x')"))
        for _ in range(2)
    ]
    for process in both:
        process.join(60)
    said = (tmp_path / "log.err").read_text()
    assert [process.exitcode for process in both] == [0, 0], said
    assert (tmp_path / "log.out").read_text().split() == 2 * [open_store("set").hash]
    assert sorted((tmp_path / "log").read_text().split()) == [item.key for item in items]
    assert "waiting" in said


@pytest.mark.parametrize("moment", ["before it is hashed", "after it was hashed"])
def test_image_store_replaced_while_it_is_opened(items, monkeypatch, moment):
    """As by another process: arrays of one store never come with the manifest of another."""
    build_store("set", items, Reader(), FIELDS)
    owner, name = (image_store, "is_intact") if "before" in moment else (np, "load")
    function, calls = getattr(owner, name), []

    def replace_first(*args, **options):
        calls.append(args)
        if len(calls) == 1:
            build_store("set", items[::-1], Reader(), FIELDS)
        return function(*args, **options)

    monkeypatch.setattr(owner, name, replace_first)
    store = open_store("set")
    assert store.keys == tuple(item.key for item in items[::-1])
    assert_close(store.arrays["number"], torch.arange(5).flip(0))
    assert store.hash == build_store("set", items[::-1], Reader(), FIELDS).hash


@pytest.mark.skipif(os.name == "nt", reason="file locks")
def test_image_store_returns_what_it_built(items, cache, monkeypatch):
    """It is opened before another process may build a store of that name from other files."""
    opened = []

    def open_locked(name):
        with pytest.raises(BlockingIOError), file_lock(cache / f".{name}.lock"):
            pass
        opened.append(name)
        return open_store(name)

    monkeypatch.setattr(image_store, "open_store", open_locked)
    assert len(build_store("set", items, Reader(), FIELDS)) == 5 and opened == ["set"]


def test_image_store_builds_where_locks_do_not_work(items, cache, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def refuse(*args):
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    other = cache / ".set.x.part"  # of somebody who may be at work
    other.mkdir(parents=True)
    assert len(build_store("set", items, Reader(), FIELDS)) == 5 and other.exists()


def test_image_store_public_names():
    stores = "first_twenty Item Store StorePlan is_intact open_store build_store store_name"
    stores += " DamagedStore"
    stores += " open_stores build_stores"
    readers = "area nearest read_image read_array check_one_size check_size"
    codes = "dense_fields encode_depth encode_normal"
    names = " ".join([stores, readers, codes])
    assert sorted(image_store.__all__) == sorted(names.split())

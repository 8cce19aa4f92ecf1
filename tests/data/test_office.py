"""Office-31, Office-Home and PACS: lists, layouts, errors, and the arrays that are made of them."""

import hashlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dbmtl.data import office as office_data
from dbmtl.data.office import (
    COUNTS,
    DOMAINS,
    class_names,
    domain_folders,
    hashed_split,
    office_files,
    office_lists,
    open_office,
    prepare_office,
)

Image = pytest.importorskip("PIL.Image")
SMALL = {  # a list of the same form as the package's: three classes, numbers of images for each
    "classes": ["mug", "bike", "pen"],
    "domains": {
        task: {
            "train": [[1, 2, 3], [4], [1, 2]],
            "validation": [[5], [6], []],
            "test": [[7], [8], [9]],
        }
        for task in ("amazon", "dslr", "webcam", "art", "clipart", "product", "real_world")
    },
}


def picture(path, gray, size=20):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((size, size + 4, 3), gray, np.uint8)).save(path)


def gray_of(place, label, number):
    return 60 * place + 15 * label + number


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Office-31 and Office-Home with the lists of SMALL, and a cache of their own."""
    sets = {}
    for name in ("office31", "officehome"):
        domains = {task: SMALL["domains"][task] for task in DOMAINS[name]}
        sets[name] = {"classes": SMALL["classes"], "domains": domains}
    monkeypatch.setattr(office_data, "_packed", lambda: sets)
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DBMTL_DATA", str(tmp_path / "data"))
    return tmp_path / "data"


def tree(root, name, folders, between="", frame="frame_{:04d}.jpg"):
    """The images of SMALL below a root; `folders` are the domains' folder names, in order."""
    for place, (task, folder) in enumerate(zip(DOMAINS[name], folders, strict=True)):
        for part in SMALL["domains"][task].values():
            for label, numbers in enumerate(part):
                for number in numbers:
                    path = root / folder / between / SMALL["classes"][label] / frame.format(number)
                    picture(path, gray_of(place, label, number))


# -------------------------------------------------------------------------------------------- lists


SIZES = {
    "office31": {
        "amazon": [1680, 552, 585],
        "dslr": [287, 89, 122],
        "webcam": [466, 149, 180],
    },
    "officehome": {
        "art": [1435, 465, 527],
        "clipart": [2596, 846, 923],
        "product": [2635, 860, 944],
        "real_world": [2586, 846, 925],
    },
}


@pytest.mark.parametrize("name", SIZES)
def test_office_lists_have_the_sizes_of_the_paper(name):
    lists = office_lists(name)
    assert list(lists) == list(SIZES[name])
    for task, parts in lists.items():
        assert [len(entries) for entries in parts.values()] == SIZES[name][task]
    entries = [entry for parts in lists.values() for part in parts.values() for entry in part]
    assert len({entry.key for entry in entries}) == len(entries) == COUNTS[name]


@pytest.mark.parametrize("name, classes", [("office31", 31), ("officehome", 65)])
def test_office_labels_mean_the_same_in_every_domain_and_part(name, classes):
    names = class_names(name)
    for parts in office_lists(name).values():
        for part in parts.values():
            assert {entry.label for entry in part} == set(range(classes))
            assert all(names[entry.label] == entry.kind for entry in part)


def test_office_lists_pinned_lines():
    """Lines of LibMTL's files, read by eye."""
    lists = office_lists("office31")
    files = [entry.file for entry in lists["amazon"]["train"][:3]]
    assert files == ["frame_0065.jpg", "frame_0063.jpg", "frame_0012.jpg"]
    assert lists["dslr"]["validation"][2] == ("dslr", "paper_notebook", "frame_0005.jpg", 1)
    home = office_lists("officehome")["real_world"]["test"][0]
    assert home == ("real_world", "Calendar", "00027.jpg", 0)


def test_office_unknown_sets_and_lists():
    with pytest.raises(ValueError, match="did you mean 'officehome'"):
        class_names("office-home")
    with pytest.raises(ValueError, match="PACS has no list"):
        office_lists("pacs")


@settings(deadline=None, max_examples=50)
@given(st.sets(st.text("abcdefgh0123456789", min_size=1), min_size=5, max_size=60), st.randoms())
def test_pacs_split_is_a_partition_that_ignores_the_order(names, random):
    names = sorted(names)
    parts = hashed_split(names)
    assert sorted(sum(parts, [])) == names
    assert abs(len(parts[0]) - 0.6 * len(names)) <= 0.5
    assert abs(len(parts[2]) - 0.2 * len(names)) <= 0.5
    shuffled = names[:]
    random.shuffle(shuffled)
    assert hashed_split(shuffled) == parts


def test_pacs_split_pinned():
    """The order is that of the digests, whatever the salt is."""
    names = [f"pic_{i:03d}.jpg" for i in range(1, 6)]
    order = sorted(names, key=lambda name: hashlib.sha256(f"photo/dog/{name}".encode()).hexdigest())
    assert hashed_split(names, "photo/dog") == (order[:3], order[3:4], order[4:])
    assert order != names


# ------------------------------------------------------------------------------------------ layouts


@pytest.mark.parametrize("between", ["images", ""])
@pytest.mark.parametrize("around", ["", "domain_adaptation_images"])
def test_office31_layouts(small, between, around):
    tree(small / "office31" / around, "office31", ["amazon", "dslr", "webcam"], between)
    items = office_files("office31")
    assert [len(items["webcam"][part]) for part in ("train", "validation", "test")] == [6, 2, 3]
    for parts in items.values():
        for item in sum(parts.values(), []):
            assert item.files[0].is_file()


@pytest.mark.parametrize("real", ["Real World", "Real_World"])
def test_officehome_real_world_with_a_space_or_without(small, real):
    folders = ["Art", "Clipart", "Product", real]
    tree(small / "officehome", "officehome", folders, frame="{:05d}.jpg")
    item = office_files("officehome")["real_world"]["test"][1]
    assert item.key == "real_world/bike/00008.jpg" and item.files[0].parent.parent.name == real
    assert item.label == {"label": 1}


def test_office_arrays_hold_the_images_of_the_list_in_its_order(small):
    folders = ["Art", "Clipart", "Product", "Real World"]
    tree(small / "officehome", "officehome", folders, frame="{:05d}.jpg")
    stores = prepare_office("officehome", size=(8, 12))
    for place, (task, parts) in enumerate(stores.items()):
        for part, store in parts.items():
            numbers_of = enumerate(SMALL["domains"][task][part])
            expected = [(label, number) for label, numbers in numbers_of for number in numbers]
            assert store.arrays["image"].shape == (len(expected), 3, 8, 12)
            assert store.arrays["label"].tolist() == [label for label, _ in expected]
            gray = store.arrays["image"].float().mean((1, 2, 3))
            wanted = torch.tensor([float(gray_of(place, *pair)) for pair in expected])
            assert (gray - wanted).abs().max() <= 1.5  # JPEG
    meta = stores["art"]["train"].meta
    assert meta["task"] == "art" and meta["set"] == "Office-Home"


def test_office_arrays_are_resized_with_the_antialiased_bilinear_filter(small):
    tree(small / "office31", "office31", ["amazon", "dslr", "webcam"])
    path = small / "office31" / "dslr" / "bike" / "frame_0008.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    Image.fromarray(noise).save(path, quality=100)
    store = prepare_office("office31", size=(16, 18))["dslr"]["test"]
    with Image.open(path) as image:
        wanted = np.asarray(image.resize((18, 16), Image.Resampling.BILINEAR)).transpose(2, 0, 1)
    np.testing.assert_array_equal(store.arrays["image"][1].numpy(), wanted)


def test_office_second_preparation_reads_nothing(small, monkeypatch):
    tree(small / "office31", "office31", ["amazon", "dslr", "webcam"], "images")
    first = prepare_office("office31", size=(8, 8))
    monkeypatch.setattr(office_data, "_read", lambda item, size: pytest.fail("read again"))
    digest = first["dslr"]["test"].hash
    assert prepare_office("office31", size=(8, 8))["dslr"]["test"].hash == digest
    assert open_office("office31", (8, 8))["dslr"]["test"].hash == digest
    assert open_office("office31", (8, 9)) is None


def test_office_a_choice_is_part_of_the_list_and_grows(small):
    tree(small / "office31", "office31", ["amazon", "dslr", "webcam"])
    two, four, everything = (
        prepare_office("office31", size=(4, 4), train=count, evaluation=1)["amazon"]["train"].keys
        for count in (2, 4, 0)
    )
    assert two == four[:2] and set(four) < set(everything) and len(everything) == 6
    assert len(open_office("office31", (4, 4), 2, 1)["webcam"]["validation"]) == 1
    with pytest.raises(ValueError, match="size=7: this list has 6 images"):
        prepare_office("office31", size=(4, 4), train=7)


# ------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize("name", DOMAINS)
def test_office_missing_set_says_what_to_get(tmp_path, name):
    with pytest.raises(FileNotFoundError, match=f"(?s)is not in .*DBMTL_DATA/{name} holds"):
        office_files(name, tmp_path / "nothing")


def test_office_everything_missing_is_named_in_one_error(small):
    root = small / "office31"
    tree(root, "office31", ["amazon", "dslr", "webcam"], "images")
    (root / "webcam").rename(root / "web")
    (root / "dslr" / "images" / "mug").rename(root / "dslr" / "images" / "cup")
    (root / "amazon" / "images" / "bike" / "frame_0006.jpg").unlink()
    with pytest.raises(FileNotFoundError) as caught:
        office_files("office31")
    text = str(caught.value)
    assert "lacks 3 of its folders or files" in text
    for path in ("webcam/", "dslr/images/mug/", "amazon/images/bike/frame_0006.jpg"):
        assert path in text


def test_office_many_missing_files_are_counted(small):
    tree(small / "office31", "office31", ["amazon", "dslr", "webcam"])
    paths = sorted(small.rglob("*.jpg"))
    gone = [path for path in paths if path.stem not in ("frame_0004", "frame_0001")]
    for path in gone:
        path.unlink()
    message = rf"lacks {len(gone)} .* and {len(gone) - 20} more\."
    with pytest.raises(FileNotFoundError, match=message):
        office_files("office31")


def test_office_corrupt_files_of_all_domains_are_named_and_nothing_half_made_is_left(small):
    root = small / "office31"
    tree(root, "office31", ["amazon", "dslr", "webcam"])
    (root / "amazon" / "mug" / "frame_0002.jpg").write_bytes(b"")
    broken = root / "webcam" / "pen" / "frame_0009.jpg"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(ValueError) as caught:
        prepare_office("office31", size=(8, 8))
    message = str(caught.value)
    assert "frame_0002.jpg" in message and "webcam/pen/frame_0009.jpg" in message
    assert open_office("office31", (8, 8)) is None


def test_pacs_a_domain_that_is_missing_is_named(tmp_path):
    for task in ("photo", "cartoon", "sketch"):
        for kind in class_names("pacs"):
            picture(tmp_path / task / kind / "pic_001.jpg", 9)
    assert domain_folders("pacs", tmp_path)["art_painting"] is None
    with pytest.raises(FileNotFoundError, match="lacks 1 of its folders or files: art_painting/"):
        office_files("pacs", tmp_path)


# -------------------------------------------------------------------------------------- real images


@pytest.mark.data
def test_office31_real_images(tmp_path, monkeypatch):
    monkeypatch.setenv("DBMTL_CACHE", str(tmp_path))
    digests = {"train": [], "validation": [], "test": []}
    for parts in office_files("office31").values():
        for part, items in parts.items():
            for item in items:
                digests[part].append(hashlib.sha256(item.files[0].read_bytes()).digest())
    assert sum(map(len, digests.values())) == 4110
    twins = sum(digest in set(digests["train"]) for digest in digests["test"])
    assert twins == 25  # byte for byte
    stores = prepare_office("office31", size=(64, 64), train=12, evaluation=6)
    for task, parts in stores.items():
        assert [len(store) for store in parts.values()] == [12, 6, 6]
        for store in parts.values():
            kinds = [key.split("/")[1] for key in store.keys]
            labels = store.arrays["label"].tolist()
            assert [class_names("office31")[label] for label in labels] == kinds
            assert store.keys[0].startswith(task) and store.arrays["image"].float().std() > 20


@pytest.mark.data
def test_pacs_real_images():
    sizes = {}
    for task, parts in office_files("pacs").items():
        sizes[task] = {part: len(items) for part, items in parts.items()}
    totals = {task: sum(parts.values()) for task, parts in sizes.items()}
    assert sum(totals.values()) == COUNTS["pacs"]
    assert totals == {"photo": 1670, "art_painting": 2048, "cartoon": 2344, "sketch": 3929}
    assert sizes["photo"] == {"train": 1001, "validation": 336, "test": 333}
